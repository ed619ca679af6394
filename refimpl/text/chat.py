"""Conversations to prompts: renders the chat template of a model file, which is a program by a stranger.

Rules of transformers (utils/chat_template_utils.py), so that a template means the same here: Jinja's immutable sandbox with
trim_blocks and lstrip_blocks, loop controls, `{% generation %}`, a tojson that does not escape HTML, raise_exception,
strftime_now, a namespace and a dict without reach into Python; inputs reduced to plain JSON.

The sandbox stops a template from reaching the machine, not from eating it: two nested loops, `'x' * 10**9` or a string doubled
thirty times need no forbidden name, and a filter that counts steps or sizes from the inside always misses one more method. So a
template runs in a child process with a limit on processor time, memory and output, set before the template is even compiled
(Jinja folds constants while compiling). The child is a fresh interpreter that imports Jinja and nothing of ours; it costs about
0.1 s per rendering. Templates known by their SHA-256 (our own, and Google's as found in llama.cpp) run in this process. Windows
has no such limits on a process, macOS none that works for memory: there only the wall clock stops a runaway.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:       # the rendering child imports this file without the package
    from refimpl.text.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 256 * 1024
"""Largest template accepted; Google's has 16 thousand characters."""
MAX_OUTPUT_CHARS = 16 * 1024 * 1024
"""Largest prompt accepted: several times what fits into Gemma 4's 262,144 tokens of context."""
MAX_CALLS = 256
"""Most tool calls in a message."""
CPU_SECONDS, WALL_SECONDS = 2, 20
"""Processor time a rendering may use, and the time after which a child that does not use its processor is given up."""
MEMORY_BYTES = 640 * 1024 * 1024
"""Address space of the child, of which the interpreter and Jinja take about 30 MiB."""

THOUGHT, CHANNEL_END = "<|channel>", "<channel|>"
ROLES = frozenset(("system", "developer", "user", "assistant", "model", "tool"))
PRIVATE_USE = range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)

TRUSTED_SHA256 = frozenset({
    "85a08664d16d8f3be4416c92427b3ac10df1024ac566cc0b4bc3bab409393f98",  # llama.cpp models/templates/google-gemma-4-31B-it.jinja
    "65f93a25708c952457106a30e185ba7beffddd726121c8d7e3f3e08b23c16c67",  # same folder, google-gemma-4-31B-it-interleaved.jinja
    "2dfbfc7d538912f4ea11d29d85b4e25d7bc26386e53f57529f1d707c28b5828c",  # in llama.cpp models/ggml-vocab-gemma-4.gguf
})


class ChatError(ValueError):
    """The conversation cannot be rendered. One line."""


def render_chat(template: str | None, messages: list[dict], *, bos_token: str, eos_token: str, add_generation_prompt: bool = True,
                thinking: bool = False, tools: list[dict] | None = None) -> str:
    """The prompt for `messages` (dicts with "role" and "content") by `template` (the file's tokenizer.chat_template).

    `messages` and `tools` are in OpenAI's form: "tool_calls" with arguments as JSON or a dict, role "tool" for a call's result.
    `thinking` is passed as `enable_thinking`, the name Gemma's template reads. Encode the result with `special=True, bos=False`;
    text in a message that spells a control token then becomes that token (`encode_chat` keeps it text).
    Raises ChatError: no template, malformed messages, an error in or from the template, more time, memory or output than allowed.
    """
    if not isinstance(template, str) or not template.strip():
        raise ChatError("the file has no chat template (tokenizer.chat_template): it only continues text")
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ChatError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} are accepted")
    _check_messages(messages)
    variables = {"messages": [_with_reasoning(message) for message in with_parsed_calls(messages)], "tools": _checked_tools(tools),
                 "documents": None,
                 "add_generation_prompt": bool(add_generation_prompt), "enable_thinking": bool(thinking),
                 "bos_token": bos_token, "eos_token": eos_token}
    if tools and "tools" not in template:
        raise ChatError("the chat template of this model does not know tools")
    request = _plain_json({"template": template, "variables": variables})
    if _is_trusted(template):
        reply = _reply(request)
    else:
        reply = _reply_of_child(request)
    if "error" in reply:
        raise ChatError(f"chat template: {reply['error']}")
    return reply["text"]


def encode_chat(tokenizer: "Tokenizer", template: str | None, messages: list[dict], *, thinking: bool = False,
                tools: list[dict] | None = None, changed: Callable[[str], str] = str) -> list[int]:
    """Token ids of the prompt for `messages`, in which text that spells a control token (`<|turn>`) stays text.

    `changed`: what becomes of the rendered prompt before it is encoded; in it, a control token that is whole comes from the template.

    This goes for every string in `messages` and `tools`: names, keys, arguments, results. Before the template runs, such text is cut by
    a character that is in none of them; what is between the cuts is encoded separately. Raises ChatError as `render_chat` does.
    """
    _check_messages(messages)
    messages = with_parsed_calls(messages)          # before cutting: JSON can spell a control token with escapes
    used = set(_plain_json([messages, tools]) + (template or ""))
    seam = next((chr(c) for area in PRIVATE_USE for c in area if chr(c) not in used), None)
    if seam is None:
        raise ChatError("the messages use every private-use character of Unicode: none is left to mark what is text")
    cut = _Cutter(tokenizer.markers, seam)
    messages = [{key: value if key == "role" and value in ROLES else cut(value) for key, value in message.items()} for message in messages]
    prompt = render_chat(template, messages, bos_token=tokenizer.token(tokenizer.bos), eos_token=tokenizer.token(tokenizer.eos),
                         thinking=thinking, tools=cut(tools))
    return [i for part in changed(prompt).split(seam) for i in tokenizer.encode(part, special=True, bos=False)]


class _Cutter:
    """Puts `seam` after the first character of everything that spells a marker, in every string of a plain JSON value.

    Looks at every length that markers have (at most 256), not at every marker: a hostile file has a hundred thousand of them.
    """

    def __init__(self, markers: Iterable[str], seam: str):
        self.markers, self.seam = frozenset(markers), seam
        self.lengths = {len(marker) for marker in self.markers}
        self.heads = re.compile(f"[{re.escape(''.join({marker[0] for marker in self.markers}))}]" if self.markers else r"(?!)")

    def __call__(self, value: object) -> object:
        if isinstance(value, str):
            return self._cut(value)
        if isinstance(value, Mapping):
            return {self(key): self(item) for key, item in value.items()}
        return [self(item) for item in value] if isinstance(value, list | tuple) else value

    def _cut(self, text: str) -> str:
        ends = [at + 1 for at in (match.start() for match in self.heads.finditer(text))
                if any(text[at:at + n] in self.markers for n in self.lengths)]
        return self.seam.join(text[first:end] for first, end in zip([0, *ends], [*ends, len(text)]))


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer) of what the model wrote: `<|channel>thought`, newline, thought, `<channel|>`, answer.

    Without a thought it is ("", text); of a thought that has not ended yet, (what there is, ""). Several thoughts are joined with
    a newline. The white space around a thought is dropped; the answer is left as it is, but for the end of a thought that never began.
    Chunk by chunk it is `ThoughtSplitter` (thoughts.py).
    """
    thoughts, answer, rest = [], [], text
    while (start := rest.find(THOUGHT)) >= 0:
        answer.append(rest[:start])
        body, _, rest = rest[start + len(THOUGHT):].partition(CHANNEL_END)
        thoughts += [part.removeprefix("thought").strip() for part in body.split(THOUGHT)]
    return "\n".join(filter(None, thoughts)), "".join(part.replace(CHANNEL_END, "") for part in (*answer, rest))


def with_parsed_calls(messages: list[dict]) -> list[dict]:
    """The messages with the arguments of tool calls as dicts, which templates read; clients write them as JSON in a string.

    Raises ChatError if they are not JSON, or not an object.
    """
    for i, message in enumerate(messages):
        if isinstance(calls := message.get("tool_calls"), list) and len(calls) > MAX_CALLS:        # templates look for each one's response
            raise ChatError(f"message {i} has {len(calls)} tool calls; at most {MAX_CALLS} are accepted")
    return [{**message, "tool_calls": [_parsed_call(i, call) for call in _list_of(message["tool_calls"], f"message {i}: tool_calls")]}
            if message.get("tool_calls") else message for i, message in enumerate(messages)]


def _parsed_call(i: int, call: object) -> dict:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatError(f"message {i}: a tool call must have a 'function' with a 'name', not {str(call)[:60]!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ChatError(f"message {i}: the arguments of {function['name'][:60]!r} are not JSON: {_one_line(error)}") from None
    if not isinstance(arguments, Mapping | None):
        raise ChatError(f"message {i}: the arguments of {function['name'][:60]!r} must be an object, not {str(arguments)[:60]!r}")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def _check_messages(messages: object):
    if not isinstance(messages, list | tuple) or not messages:
        raise ChatError("messages must be a list with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {i} must be a dict with a 'role', not {str(message)[:60]!r}")


def _checked_tools(tools: object) -> list[dict] | None:
    for i, tool in enumerate(_list_of(tools or [], "tools")):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"tool {i} must have a 'function' with a 'name', not {str(tool)[:60]!r}")
    return tools or None


def _list_of(value: object, name: str) -> Iterable:
    if not isinstance(value, list | tuple):
        raise ChatError(f"{name} must be a list, not {str(value)[:60]!r}")
    return value


def _plain_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"messages must be plain JSON: {_one_line(error)}") from None


def _is_trusted(template: str) -> bool:
    from refimpl.text.templates import GEMMA4_TEMPLATE  # not above: the rendering child has no package

    return template == GEMMA4_TEMPLATE or hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest() in TRUSTED_SHA256


def _with_reasoning(message: Mapping) -> dict:
    """Older names of a message's reasoning are given the one templates read, as transformers does."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _reply(request: str) -> dict[str, str]:
    """Renders a request: {"text": ...} or {"error": ...}. Runs in either process."""
    request = json.loads(request)  # also what makes sure that a template sees plain types and nothing of the caller's
    try:
        chunks, n_chars = [], 0
        for chunk in _compiled(request["template"]).generate(**request["variables"]):
            chunks.append(chunk)
            n_chars += len(chunk)
            if n_chars > MAX_OUTPUT_CHARS:
                return {"error": f"the prompt grows beyond {MAX_OUTPUT_CHARS} characters"}
        return {"text": "".join(chunks)}
    except MemoryError:
        return {"error": f"rendering needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template can raise anything
        return {"error": _one_line(error)}


def _reply_of_child(request: str) -> dict[str, str]:
    if not sys.executable:  # Python embedded in another program
        return {"error": "rendering a template that is not a known one needs a Python interpreter to start"}
    # -I: no environment variables and no current directory; the search path is handed over, so that the child finds our Jinja
    command = [sys.executable, "-I", __file__, json.dumps(sys.path)]
    try:
        child = subprocess.run(command, input=request.encode(), capture_output=True, timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"rendering took more than {WALL_SECONDS} s"}
    except OSError as error:
        return {"error": f"the process that renders could not be started: {_one_line(error)}"}
    if child.returncode < 0:  # ended by a signal: SIGXCPU or SIGKILL at the limit, SIGSEGV if a template overflows the stack
        return {"error": f"rendering needs more than {CPU_SECONDS} s or crashed (signal {-child.returncode})"}
    try:
        return json.loads(child.stdout)
    except ValueError:
        return {"error": f"the process that renders failed: {child.stderr.decode(errors='replace').strip()[-300:]!r}"}


def _child_main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    _environment()  # Jinja is imported before the limits, so that they are the template's alone
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        for limit, value in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES)):
            try:
                resource.setrlimit(limit, (value, value))
            except (ValueError, OSError):  # macOS refuses some; the wall clock remains
                pass
    json.dump(_reply(sys.stdin.read()), sys.stdout)


@lru_cache(maxsize=8)
def _compiled(template: str):
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment():
    """The Jinja environment described at the top. Imported here and not above: most programs never render a template."""
    from datetime import datetime

    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise ChatError(f"jinja2 {jinja2.__version__} has known ways out of its sandbox; 3.1.6 or newer is needed")

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the model wrote, for training; here it is just its body."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Refuses names with a leading underscore."""

        def __init__(*args, **kwargs):
            values = dict(*args[1:], **kwargs)
            for name in values:
                _refuse_underscore(name)
            jinja2.utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name, value):
            _refuse_underscore(name)
            super().__setitem__(name, value)

    def _refuse_underscore(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: its name begins with an underscore")

    class Dict:
        """`dict(...)` and `dict.fromkeys` without the type and its attributes."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "namespace": Namespace, "dict": Dict(),
                            "strftime_now": lambda pattern: datetime.now().strftime(pattern)}
    return environment


if __name__ == "__main__":
    _child_main()
