"""Text: tokenisers (text to classes and back, one module a kind) and the scoring of hypotheses.

    tokeniser = make_tokeniser(config.vocabulary, texts) # of the kind that the settings name, perhaps learnt of texts
    checkpoint["tokeniser"] = tokeniser.state()
    tokeniser_from_state(checkpoint["tokeniser"])        # the same tokeniser

A new kind is a module with a class that keeps the promises in protocol.py, its settings in config.py, and a function
and a line in `TOKENISERS`; the tests run over all that are registered.
"""

from collections.abc import Callable, Iterable
from typing import Any

from ddp_asr.errors import UserError
from ddp_asr.text.protocol import TextCounts, Tokeniser

__all__ = ["TOKENISERS", "UNITS", "TextCounts", "Tokeniser", "make_tokeniser", "tokeniser_from_state"]

UNITS = {"char": "characters", "piece": "word pieces"}  # `Tokeniser.unit` in words


def _characters() -> type[Tokeniser]:
    from ddp_asr.text.characters import Characters

    return Characters


def _pieces() -> type[Tokeniser]:
    from ddp_asr.text.pieces import Pieces

    return Pieces


# kind in the settings -> its class, imported when it is asked for, because a kind may need a package of its own
TOKENISERS: dict[str, Callable[[], type[Tokeniser]]] = {
    "characters": _characters,
    "pieces": _pieces,
}


def make_tokeniser(settings: Any, transcripts: Iterable[str] = ()) -> Tokeniser:
    """The tokeniser that `settings.kind` names; `transcripts` are read only where that kind is learnt of them.

    Raises:
        UserError: its package is missing, its file cannot be read, or it cannot be learnt of these transcripts.
    """
    return TOKENISERS[settings.kind]().from_settings(settings, transcripts)


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
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint's tokeniser of kind {kind!r} lacks a part, or has one of another type ({error}): use the "
            "version of ddp_asr that wrote the checkpoint"
        ) from None
