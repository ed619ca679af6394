"""An endpoint in one form, whichever engine it is: what it offers is tried, once, before anything is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from refimpl.lab.judge.answers import Answer, answer_of, generated_of, native_of
from refimpl.lab.judge.http import EndpointError, Http
from refimpl.lab.judge.prompt_answers import prompt_steps, without_echo

TOPS = (20, 10, 5)              # how many probabilities a position are asked for; mlx_lm allows 11, OpenAI's completions 5
NATIVE_TOP = 100                # and in llama-server's own form, which allows any number
COMPLETIONS, CHAT, GENERATE, NATIVE = "/v1/completions", "/v1/chat/completions", "/api/generate", "/completion"
N_PROBE = 4                     # tokens of the answer that tells what is there
RAW = {"top_p": 1.0}            # nothing but temperature 1 between the logits and the choice
MORE = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}        # what engines beyond OpenAI's API add to it by default


@dataclass
class Endpoint:
    """`engine`: what it says it is. `n_top`: probabilities a position in completions (0: none), `chat_top`: in chats (None: no chats),
    `prompt_top`: of the prompt's own tokens.

    `form`: the path at which it continues a text, if `completes`. `takes_ids`: does it take token ids as a prompt? `asks_as_chats`: does it
    want to be asked for probabilities of a text as of a chat, as mlx_lm does? `more`: fields beyond OpenAI's that it may be sent. `why`:
    what it says about "completions" or "chat" where it has none.
    """

    http: Http
    model: str | None = None
    engine: str = "unknown engine"
    n_ctx: int | None = None
    form: str = COMPLETIONS
    takes_ids: bool = False
    asks_as_chats: bool = False
    completes: bool = False
    n_top: int = 0
    chat_top: int | None = None
    prompt_top: int = 0
    more: Mapping[str, object] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def gives_probabilities(self) -> bool:
        """Anywhere?"""
        return bool(self.n_top or self.chat_top)

    def thinking_fields(self, thinking: bool) -> dict[str, object]:
        """What asks this engine to think before it answers, or not to; nothing where it may not know how to be asked."""
        if self.engine.startswith("ollama"):            # where models that can think do, unless told
            return {"reasoning_effort": "high" if thinking else "none"}
        return {"chat_template_kwargs": {"enable_thinking": thinking}} if self.more else {}

    def complete(self, prompt: str | Sequence[int], n_new: int, *, seed: int = 0, temperature: float = 1.0, cold: bool = False,
                 whole: bool = False) -> Answer:
        """Continues a text or ids by `n_new` tokens. `cold`: an engine that can be asked to forget, does; `whole`: one that gives
        probabilities of the prompt's own ids, does. Raises EndpointError.
        """
        prompt = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
        if self.form == GENERATE:
            options = {"temperature": temperature, "seed": seed, "num_predict": n_new, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
                       "repeat_penalty": 1.0}
            fields = {"model": self.model, "prompt": prompt, "raw": True, "stream": False, "options": options}
            more = {"logprobs": True, "top_logprobs": self.n_top} if self.n_top else {}
            return generated_of(self.http.post(GENERATE, fields | more), GENERATE)
        fields = {"prompt": prompt, "temperature": temperature, "seed": seed, **RAW, **self.more}
        if cold and self.engine.startswith("llama-server"):
            fields["cache_prompt"] = False
        if self.form == NATIVE:
            fields |= {"n_predict": n_new, "n_probs": self.n_top, "return_tokens": True, "post_sampling_probs": False}
            return native_of(self.http.post(NATIVE, self._named(fields)), NATIVE)
        fields["max_tokens"] = n_new
        if self.n_top:
            fields |= {"logprobs": True, "top_logprobs": self.n_top} if self.asks_as_chats else {"logprobs": self.n_top}
        whole = whole and self.prompt_top > 0
        if self.engine.startswith("vLLM"):
            fields |= {"return_tokens_as_token_ids": True} | ({"prompt_logprobs": self.prompt_top} if whole else {})
        elif whole:
            fields["echo"] = True
        body, before = self.http.post(COMPLETIONS, self._named(fields)), ()
        if whole and "echo" in fields:
            body, before = without_echo(body, prompt, self.n_top, COMPLETIONS)
        elif whole:
            before = prompt_steps(body, prompt, self.prompt_top, COMPLETIONS)
        return replace(answer_of(body, COMPLETIONS, self.n_top), prompt=before)

    def chat(self, messages: Sequence[Mapping[str, object]], n_new: int, *, tools: Sequence[Mapping] = (), thinking: bool = False,
             seed: int = 0) -> Answer:
        """Answers a conversation with at most `n_new` tokens. Raises EndpointError."""
        fields = {"messages": list(messages), "max_tokens": n_new, "temperature": 1.0, "seed": seed, **RAW, **self.more,
                  **self.thinking_fields(thinking)}
        if tools:
            fields["tools"] = list(tools)
        if self.chat_top:
            fields |= {"logprobs": True, "top_logprobs": self.chat_top}
        if self.engine.startswith("vLLM"):
            fields["return_tokens_as_token_ids"] = True
        return answer_of(self.http.post(CHAT, self._named(fields)), CHAT, self.chat_top or 0)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, <bos> in front; control tokens in it count as such. Raises EndpointError."""
        fields = {"content": text, "add_special": True, "parse_special": True}
        if self.engine.startswith("vLLM"):
            fields = {"prompt": text, "add_special_tokens": True}
        return self._ids_of(fields)

    def _ids_of(self, fields: Mapping[str, object]) -> list[int]:
        body = self.http.post("/tokenize", self._named(fields))
        ids = body.get("tokens") if isinstance(body, Mapping) else None
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise EndpointError(f"/tokenize: no list of ids: {str(body)[:60]!r}")
        return ids

    def render(self, messages: Sequence[Mapping[str, object]], *, tools: Sequence[Mapping] = (), thinking: bool = False) -> str | list[int]:
        """The text of a conversation by its template, or its ids (vLLM's /tokenize takes conversations too). Raises EndpointError."""
        fields = {"messages": list(messages), "chat_template_kwargs": {"enable_thinking": thinking}}
        if tools:
            fields["tools"] = list(tools)
        if self.engine.startswith("vLLM"):
            return self._ids_of(fields)
        body = self.http.post("/apply-template", fields)
        text = body.get("prompt") if isinstance(body, Mapping) else None
        if not isinstance(text, str):
            raise EndpointError(f"/apply-template: no prompt: {str(body)[:60]!r}")
        return text

    def _named(self, fields: Mapping[str, object]) -> dict[str, object]:
        return dict(fields) if self.model is None else {"model": self.model} | dict(fields)


def explore(http: Http, model: str | None, probe: Sequence[int], text: str) -> Endpoint:
    """Finds out what is there. `probe`: ids that any file of this vocabulary has, `text`: the same as a text.

    Raises EndpointError where nothing can be asked at all.
    """
    end = Endpoint(http, model)
    _introduced(end)
    if end.engine.startswith("ollama"):
        end.form = GENERATE
        _choose(end, (20, 0), (text,))
    else:
        _completions(end, probe, text)
    _chats(end)
    if not end.completes and end.chat_top is None:
        raise EndpointError("; ".join(end.why.values()))
    return end


def _introduced(end: Endpoint):
    """Engine, name of the model, context: what it says of itself, where it does."""
    listed = _maybe(end.http, "/v1/models")
    data = listed.get("data") if isinstance(listed, Mapping) else None
    first = next((m for m in data if isinstance(m, Mapping)), {}) if isinstance(data, list) else {}
    names = [m.get("id") for m in data if isinstance(m, Mapping)] if isinstance(data, list) else []
    if end.model is None and names and isinstance(names[0], str):
        end.model = names[0]
    end.n_ctx = next((n for n in (first.get("max_model_len"), _inside(first, "meta", "n_ctx")) if isinstance(n, int) and n > 0), None)
    owner = {"llamacpp": "llama-server", "vllm": "vLLM", "refimpl": "refimpl", "library": "ollama"}.get(first.get("owned_by"))
    end.engine = owner or end.engine
    if owner == "llama-server":
        props = _maybe(end.http, "/props")
        build = props.get("build_info") if isinstance(props, Mapping) else None
        end.engine += f" {build}" if isinstance(build, str) and len(build) < 60 else ""
    elif owner in ("vLLM", "ollama"):
        said = _maybe(end.http, "/version" if owner == "vLLM" else "/api/version")
        version = said.get("version") if isinstance(said, Mapping) else None
        end.engine += f" {version}" if isinstance(version, str) and len(version) < 60 else ""
    if end.engine != "unknown engine" and not end.engine.startswith("ollama"):
        end.more = MORE


def _completions(end: Endpoint, probe: Sequence[int], text: str):
    """Which form is taken: llama-server's own, which tells all ids of an answer, before /v1/completions, ids before text, many
    probabilities before few.
    """
    if end.engine.startswith("llama-server"):
        end.form = NATIVE
        _choose(end, (NATIVE_TOP,), (list(probe),))
        if end.completes and end.n_top:
            return
        end.form, end.completes = COMPLETIONS, False
    _choose(end, (*TOPS, 0), (list(probe), text))
    if end.takes_ids and end.n_top and not end.engine.startswith(("llama-server", "refimpl")):        # which have none of the prompt
        end.prompt_top = end.n_top
        try:
            answer = end.complete(list(probe), 1, whole=True)
            end.prompt_top = min(len(step.top) for step in answer.prompt)
        except EndpointError as error:
            if error.fatal:
                raise
            end.prompt_top = 0


def _choose(end: Endpoint, tops: Sequence[int], prompts: Sequence[str | list[int]]):
    for n_top in tops:
        for prompt, as_chats in product(prompts, (False, True) if n_top and end.form == COMPLETIONS else (False,)):
            end.n_top, end.asks_as_chats = n_top, as_chats
            try:
                answer = _with_tokens(lambda seed, prompt=prompt: end.complete(prompt, N_PROBE, seed=seed))
            except EndpointError as error:
                end.why["completions"] = str(error)
                if error.fatal:
                    raise
                if not error.is_refusal or error.status in (404, 405) and isinstance(prompt, str):
                    return                      # mlx_lm says 404 to ids
                continue
            end.completes, end.takes_ids = True, not isinstance(prompt, str)
            end.n_top = min(n_top, answer.n_top)
            end.why.pop("completions", None)
            return


def _chats(end: Endpoint):
    for n_top in (*TOPS, 0):
        end.chat_top = n_top
        try:
            answer = _with_tokens(lambda seed: end.chat([{"role": "user", "content": "x"}], N_PROBE, seed=seed))
        except EndpointError as error:
            end.chat_top, end.why["chat"] = None, str(error)
            if error.fatal:
                raise
            if not error.is_refusal or error.status in (404, 405):
                return
            continue
        end.chat_top = min(n_top, answer.n_top)
        end.why.pop("chat", None)
        return


def _with_tokens(ask: Callable[[int], Answer]) -> Answer:
    """The first answer that has probabilities: one that ends at once lists none."""
    for seed in range(3):
        answer = ask(seed)
        if answer.n_top:
            break
    return answer


def _maybe(http: Http, path: str) -> object:
    """What a GET answers, None where it is refused or no JSON. Raises EndpointError where nothing answers at all."""
    try:
        return http.get(path)
    except EndpointError as error:
        if error.fatal:
            raise
        return None


def _inside(value: Mapping, *keys: str) -> object:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
