"""Text: tokenisers (text to classes and back, one module a kind) and the scoring of hypotheses.

    tokeniser = make_tokeniser(config.vocabulary)        # of the kind that the settings name
    checkpoint["tokeniser"] = tokeniser.state()
    tokeniser_from_state(checkpoint["tokeniser"])        # the same tokeniser

A new kind is a module with a class that keeps the promises in protocol.py, its settings in config.py, and a function
and a line in `TOKENISERS`; the tests run over all that are registered.
"""

from collections.abc import Callable
from typing import Any

from ddp_asr.errors import UserError
from ddp_asr.text.protocol import TextCounts, Tokeniser

__all__ = ["TOKENISERS", "TextCounts", "Tokeniser", "make_tokeniser", "tokeniser_from_state"]


def _characters() -> type[Tokeniser]:
    from ddp_asr.text.characters import Characters

    return Characters


# kind in the settings -> its class, imported when it is asked for, because a kind may need a package of its own
TOKENISERS: dict[str, Callable[[], type[Tokeniser]]] = {
    "characters": _characters,
}


def make_tokeniser(settings: Any) -> Tokeniser:
    """The tokeniser that `settings.kind` names."""
    return TOKENISERS[settings.kind]().from_settings(settings)


def tokeniser_from_state(state: dict[str, Any]) -> Tokeniser:
    """The tokeniser whose state a checkpoint holds.

    Raises:
        UserError: a kind that is not registered, as of a checkpoint that a later version wrote, or no state of one.
    """
    kind = state.get("kind") if isinstance(state, dict) else None
    if not isinstance(kind, str) or kind not in TOKENISERS:
        raise UserError(
            f"the checkpoint's tokeniser is of kind {kind!r:.80}, and this version of ddp_asr has only: "
            f"{', '.join(TOKENISERS)}; use the version that wrote the checkpoint"
        )
    try:
        return TOKENISERS[kind]().from_state(state)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint's tokeniser of kind {kind!r} lacks a part, or has one of another type ({error}): use the "
            "version of ddp_asr that wrote the checkpoint"
        ) from None
