"""`sample`: prompts continued or answered by one model or several, and a conversation with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.bases import fitting
from orchestrator.data.templates import Turn
from orchestrator.errors import Invalid, Usage
from orchestrator.models import chat
from orchestrator.models import load as models
from orchestrator.models.load import Drawing, Opened
from orchestrator.models.names import Found, find, find_all, opened
from runs.store import Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Talk:
    """How a model that was tuned on a chat format is spoken to."""

    template: str | None = None
    """None: the one that the checkpoint names."""
    system: str | None = None


@dataclass(frozen=True)
class Ask:
    """What the command line says."""

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    how: Drawing
    talk: Talk | None = None
    tokenizer: str | None = None
    which: str = "best"
    device: str = "cpu"


def silent(_text: str) -> None:
    """For those who want the result alone."""


def open_ended(ask: Ask, *, quiet: bool) -> bool:
    """Whether the requests come line by line. Raises Usage where several models or a JSON document are wanted of that."""
    if ask.talk is None or ask.prompts:
        return False
    if quiet or len(ask.models) > 1:
        raise Usage(
            "a conversation is with one model, on the terminal", "give the requests as arguments: PROMPT..."
        )
    return True


def sample(store: Store, ask: Ask, say: Say) -> list[list[dict[str, Any]]]:
    """For each model a list with what it makes of each prompt; `say` hears it while it is made. All prompts are checked
    before a model's first word. Raises NoSuchRun, NothingToFetch, Invalid, Usage, DataError."""
    found = find_all(store, ask.models, ask.which)
    prompts = list(ask.prompts) or list(found[0].prompts[:1])
    if not prompts:
        raise Usage("there is no prompt", f"llmctl sample {found[0].name} 'Every effort moves you'")
    return [_of_model(item, prompts, ask, say) for item in found]


def document(samples: Sequence[Sequence[dict[str, Any]]]) -> Any:
    """The JSON form: one sample, or a list of them."""
    flat = [item for texts in samples for item in texts]
    return flat[0] if len(flat) == 1 else flat


def _of_model(found: Found, prompts: Sequence[str], ask: Ask, say: Say) -> list[dict[str, Any]]:
    ready, how, talk = opened(found, ask.device, ask.tokenizer), ask.how, ask.talk
    for prompt in prompts:
        models.prompt_tokens(ready, _rendered(ready, [Turn(prompt)], talk) if talk else prompt)
    template = chat.template_of(ready, talk.template).name if talk else None
    return [
        {"run": found.run, "path": str(found.path), "step": found.step, "prompt": prompt,
         "text": _heard(_stream(ready, prompt, how, talk), say, "" if talk else prompt), "chat": template,
         "max_tokens": how.tokens, "seed": how.seed, "temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
        for prompt in prompts
    ]  # fmt: skip


def _stream(ready: Opened, prompt: str, how: Drawing, talk: Talk | None) -> Iterator[str]:
    if talk is None:
        return models.stream(ready, prompt, how)
    return chat.respond(ready, [Turn(prompt)], how, name=talk.template, system=talk.system)


def _rendered(ready: Opened, turns: Sequence[Turn], talk: Talk) -> str:
    if not turns[-1].instruction.strip():
        raise Invalid("the prompt is empty", "say what the model is to do")
    return chat.template_of(ready, talk.template).render(turns, talk.system)


def _heard(stream: Iterable[str], say: Say, begin: str) -> str:
    """All of a stream, each piece said as it comes, behind `begin`."""
    say(begin)
    pieces = []
    for piece in stream:
        say(piece)
        pieces.append(piece)
    say("\n")
    return "".join(pieces)


def converse(store: Store, ask: Ask, lines: Iterable[str], say: Say, cue: Callable[[], None]) -> int:
    """Answer line after line of one conversation, once `cue` was given; how many there were. What no longer fits the
    context is forgotten, the oldest first. Raises Invalid where a line alone is too long, or as `sample`."""
    assert ask.talk is not None
    ready, talk = opened(find(store, ask.models[0], ask.which), ask.device, ask.tokenizer), ask.talk
    chat.template_of(ready, talk.template)
    cue()
    turns: list[Turn] = []
    count = 0
    for line in lines:
        if not line.strip():
            continue
        turns.append(Turn(line.strip()))
        while len(turns) > 1 and _too_long(ready, turns, talk):
            turns = turns[1:]
        stream = chat.respond(ready, turns, ask.how, name=talk.template, system=talk.system)
        turns = chat.answered(turns, _heard(stream, say, "").strip())
        count += 1
    if not count:
        raise Usage("there was no request", "type one on a line, or give it as PROMPT")
    return count


def _too_long(ready: Opened, turns: Sequence[Turn], talk: Talk) -> bool:
    tokenizer = fitting(ready.tokenizer, ready.config.model.vocab_size)
    return len(tokenizer.encode(_rendered(ready, turns, talk))) > ready.config.model.context_length
