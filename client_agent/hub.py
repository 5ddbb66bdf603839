"""Whether the Hugging Face hub has a model, asked once: transformers itself would try again for half a minute."""

from functools import lru_cache
from typing import Final

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from client_agent.tables import first_line

ANSWER_S: Final = 10.0
"""Seconds that the hub has to answer in."""


@lru_cache(maxsize=8)
def absence_on_hub(name: str) -> str:
    """Why a model cannot be had from the hub by that name; "" if it can. Only what has been downloaded remains then.

    One request, of a few bytes, to `HF_ENDPOINT`, through the usual proxies; none if `HF_HUB_OFFLINE` or
    `TRANSFORMERS_OFFLINE` is set.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=ANSWER_S)
    except Exception as error:  # noqa: BLE001 - of whatever library asks: no name, no route, a proxy's refusal
        silent = f"the Hugging Face hub does not answer: {first_line(error)}"
        return next((words for kind, words in _REFUSALS if isinstance(error, kind)), silent)
    return ""


_REFUSALS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and it has not been downloaded before"),
    (HFValidationError, "the Hugging Face hub allows no such name"),
    (
        GatedRepoError,
        "the Hugging Face hub gives it only to users who accepted its terms: accept them there, then `hf auth login`",
    ),
    (
        RepositoryNotFoundError,
        "the Hugging Face hub has no model of that name (if it is private: `hf auth login`)",
    ),
    (EntryNotFoundError, "the Hugging Face hub has that model, but without a config.json"),
)
"""The first that an error is."""
