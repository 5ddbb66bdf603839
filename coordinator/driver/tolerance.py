"""Work whose failure is logged, and tried again by the loop that called."""

from collections.abc import Coroutine
from typing import Any

import structlog

from shelora.errors import DomainError

_log = structlog.get_logger(__name__)


async def tolerant(work: Coroutine[Any, Any, Any], event: str, **fields: str) -> Any:  # noqa: ANN401 - of any work
    """The result of work, or None if it failed: logged, and tried again by the loop that called."""
    try:
        return await work
    except DomainError as error:
        _log.warning(event, reason=error.reason, why=error.message, **fields)
    except Exception:  # noqa: BLE001 - one federation's fault must not stop the driver of the others
        _log.exception(event, **fields)
    return None
