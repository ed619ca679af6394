"""The chat templates of files made here, written anew: Google's may not be shipped."""

CONTINUED = 128         # tokens of an answer by a model that has no turns, and so does not know when to stop
# of a base model: no turns
CONTINUATION_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<|' ~ part['type'] ~ '|>' }}{% endfor %}"
    "{% endif %}{{ '\\n' }}{% endfor %}")
GEMMA4_TEMPLATE = r"""
{%- set quote = '<|"|>' %}
{%- set media = ['image', 'audio', 'video'] %}
{%- set only = 'this template has text, images, audio and video only' %}
{%- macro value_of(value, quoted_keys=false) %}
    {#- a value in Gemma's notation: strings between quote tokens, and in declarations the keys of what is not a schema too #}
    {%- if value is string %}
        {{- quote ~ value ~ quote }}
    {%- elif value is boolean %}
        {{- value | lower }}
    {%- elif value is mapping %}
        {{- '{' ~ pairs_of(value, quoted_keys) ~ '}' }}
    {%- elif value is sequence %}
        {{- '[' }}
        {%- for item in value %}{{ value_of(item, quoted_keys) ~ (',' if not loop.last) }}{% endfor %}
        {{- ']' }}
    {%- else %}
        {{- value }}
    {%- endif %}
{%- endmacro %}
{%- macro pairs_of(mapping, quoted_keys=false) %}
    {%- for key, value in mapping | dictsort %}
        {{- (quote ~ key ~ quote if quoted_keys else key) ~ ':' ~ value_of(value, quoted_keys) ~ (',' if not loop.last) }}
    {%- endfor %}
{%- endmacro %}
{%- macro names_of(names) %}
    {%- for name in names %}{{ quote ~ name ~ quote ~ (',' if not loop.last) }}{% endfor %}
{%- endmacro %}
{%- macro items_of(items) %}
    {#- what the elements of a list are: words of a schema are written as they are, the rest as a value #}
    {%- for key, value in items | dictsort if value is not none %}
        {{- key ~ ':' }}
        {%- if key == 'properties' %}
            {{- '{' ~ (fields_of(value) if value is mapping) ~ '}' }}
        {%- elif key == 'required' %}
            {{- '[' ~ names_of(value) ~ ']' }}
        {%- elif key == 'type' %}
            {{- value_of(value | upper if value is string else value | map('upper') | list) }}
        {%- else %}
            {{- value_of(value, true) }}
        {%- endif %}
        {{- ',' if not loop.last }}
    {%- endfor %}
{%- endmacro %}
{%- macro field_of(schema) %}
    {%- set type = schema['type'] | upper %}
    {%- if schema['description'] %}description:{{ quote ~ schema['description'] ~ quote }},{% endif %}
    {%- if type == 'STRING' and schema['enum'] %}enum:{{ value_of(schema['enum'], true) }},{% endif %}
    {%- if type == 'ARRAY' and schema['items'] is mapping and schema['items'] %}
        {{- 'items:{' ~ items_of(schema['items']) ~ '},' }}
    {%- endif %}
    {%- if schema['nullable'] %}nullable:true,{% endif %}
    {%- if type == 'OBJECT' %}
        {%- if schema['properties'] is mapping %}
            {{- 'properties:{' ~ fields_of(schema['properties']) ~ '},' }}
        {%- elif schema is mapping %}
            {{- 'properties:{' ~ fields_of(schema) ~ '},' }}
        {%- endif %}
        {%- if schema['required'] %}required:[{{ names_of(schema['required']) }}],{% endif %}
    {%- endif %}
    {{- 'type:' ~ quote ~ type ~ quote }}
{%- endmacro %}
{%- macro fields_of(properties) %}
    {#- five names cannot be told from words of a schema, so arguments of these names are not declared #}
    {%- set words = ['description', 'type', 'properties', 'required', 'nullable'] %}
    {%- for name, schema in properties | dictsort if name not in words %}
        {{- name ~ ':{' ~ field_of(schema) ~ '}' ~ (',' if not loop.last) }}
    {%- endfor %}
{%- endmacro %}
{%- macro declaration_of(function) %}
    {{- 'declaration:' ~ function['name'] ~ '{description:' ~ quote ~ function['description'] ~ quote }}
    {%- set schema = function['parameters'] %}
    {%- if schema %}
        {{- ',parameters:{' }}
        {%- if schema['properties'] %}properties:{{ '{' ~ fields_of(schema['properties']) ~ '}' }},{% endif %}
        {%- if schema['required'] %}required:[{{ names_of(schema['required']) }}],{% endif %}
        {%- if schema['type'] %}type:{{ quote ~ schema['type'] | upper ~ quote ~ '}' }}{% endif %}
    {%- endif %}
    {%- if 'response' in function %}
        {%- set schema = function['response'] %}
        {{- ',response:{' }}
        {%- if schema['description'] %}description:{{ quote ~ schema['description'] ~ quote }},{% endif %}
        {%- if schema['type'] | upper == 'OBJECT' %}type:{{ quote ~ 'OBJECT' ~ quote ~ '}' }}{% endif %}
    {%- endif %}
    {{- '}' }}
{%- endmacro %}
{%- macro response_of(name, response) %}
    {{- '<|tool_response>response:' ~ name ~ '{' }}
    {{- pairs_of(response) if response is mapping else 'value:' ~ value_of(response) }}
    {{- '}<tool_response|>' }}
{%- endmacro %}
{%- macro text_of(message) %}
    {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else [] %}
    {%- if message.content is not string and message.content is sequence %}
        {%- set parts = message.content %}
    {%- endif %}
    {%- for part in parts %}
        {%- if part.type in media %}
            {{- '<|' ~ part.type ~ '|>' }}
        {%- elif part.type != 'text' %}
            {{- raise_exception(only) }}
        {%- elif message.role in ['assistant', 'model'] %}
            {#- thoughts of earlier turns are not shown to the model again #}
            {%- set answer %}
                {%- for piece in part.text.split('<channel|>') %}{{ piece.split('<|channel>')[0] }}{% endfor %}
            {%- endset %}
            {{- answer | trim }}
        {%- else %}
            {{- part.text | trim }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
{{- bos_token }}
{%- set has_system = messages[0].role in ['system', 'developer'] %}
{%- if has_system or enable_thinking or tools %}
    {{- '<|turn>system\n' }}
    {{- '<|think|>\n' if enable_thinking }}
    {{- text_of(messages[0]) if has_system }}
    {%- for tool in tools or [] %}{{ '<|tool>' ~ declaration_of(tool['function']) ~ '<tool|>' }}{% endfor %}
    {{- '<turn|>\n' }}
{%- endif %}
{%- set messages = messages[1:] if has_system else messages %}
{%- set now = namespace(question=-1, role='', calls=none, open=false) %}
{%- for message in messages if message.role == 'user' %}{% set now.question = now.question + 1 %}{% endfor %}
{%- set n_questions = now.question + 1 %}
{%- set now.question = 0 %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {#- written with the call that it answers #}
        {{- raise_exception('this template has no place for a tool response that follows no call') if not now.calls }}
    {%- elif message.role not in ['system', 'developer', 'user', 'assistant', 'model'] %}
        {{- raise_exception('this template has no role ' ~ message.role) }}
    {%- else %}
        {%- set role = 'model' if message.role == 'assistant' else message.role %}
        {%- set now.question = now.question + 1 if role == 'user' else now.question %}
        {#- an answer that follows an answer, or the responses to its calls, continues its turn #}
        {%- if not (role == 'model' and now.role == 'assistant') %}
            {{- '<|turn>' ~ role ~ '\n' }}
        {%- endif %}
        {%- set now.role = message.role %}
        {%- set now.calls = none if message.tool_responses else message.tool_calls %}
        {#- what was thought for a call is shown until the next question #}
        {%- set thought = message.reasoning or message.reasoning_content %}
        {%- if thought and message.tool_calls and now.question == n_questions %}
            {{- '<|channel>thought\n' ~ thought ~ '\n<channel|>' }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set arguments = call.function.arguments %}
            {{- '<|tool_call>call:' ~ call.function.name ~ '{' }}
            {{- pairs_of(arguments) if arguments is mapping else (arguments if arguments is string) }}
            {{- '}<tool_call|>' }}
        {%- endfor %}
        {%- set responses = namespace(given=false) %}
        {%- for response in message.tool_responses or [] %}
            {{- response_of(response.name | default('unknown'), response.response) }}
            {%- set responses.given = true %}
        {%- endfor %}
        {%- if now.calls %}
            {%- for reply in messages[loop.index:] %}
                {%- if reply.role != 'tool' %}{% break %}{% endif %}
                {%- set called = namespace(name=reply.name | default('unknown')) %}
                {%- for call in now.calls if call.id == reply.tool_call_id %}{% set called.name = call.function.name %}{% endfor %}
                {%- set is_list = reply.content is sequence and reply.content is not string and reply.content is not mapping %}
                {%- if is_list %}
                    {#- what it shows is behind what it says #}
                    {{- response_of(called.name, reply.content | selectattr('type', '==', 'text') | map(attribute='text') | join) }}
                    {%- for part in reply.content if part.type != 'text' %}
                        {{- '<|' ~ part.type ~ '|>' if part.type in media else raise_exception(only) }}
                    {%- endfor %}
                {%- else %}
                    {{- response_of(called.name, reply.content) }}
                {%- endif %}
                {%- set responses.given = true %}
            {%- endfor %}
        {%- endif %}
        {{- text_of(message) }}
        {%- set now.open = responses.given or message.tool_calls %}
        {%- if message.tool_calls and not responses.given %}
            {{- '<|tool_response>' }}
        {%- elif message.content or not responses.given %}
            {{- '<turn|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{#- after a response the model's turn is still open #}
{%- if add_generation_prompt and not now.open %}
    {{- '<|turn>model\n' }}
    {#- with thinking off, the thought is given, and empty #}
    {{- '<|channel>thought\n<channel|>' if not enable_thinking }}
{%- endif %}
"""
"""The rendering of Google's, for conversations of text, tools, pictures and sounds, thinking on or off. What it cannot render it refuses: a
tool response that follows no call. Pictures in a tool's response stand behind it, as in Google's later template; the earlier one left them
out. Calls and declarations are written in Gemma's notation, which answer.py reads."""
