# SPDX-License-Identifier: Apache-2.0
"""What went wrong with a model on the hub, in one sentence that names the flag and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_bagel.common.hub_names import HubName


def unreachable() -> tuple[type[Exception], ...]:
    """Return the errors of huggingface_hub and its HTTP library that mean: no connection. Releases use requests, httpx or httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    library = __import__(HfHubHTTPError.__bases__[0].__module__.split(".")[0])
    names = ("ConnectError", "TimeoutException", "NetworkError", "ConnectionError", "Timeout")
    candidates = (getattr(library, name, None) for name in names)
    return (*(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Exception)), ConnectionError, TimeoutError)


@contextmanager
def readable_hub_errors(flag: str, name: HubName) -> Iterator[None]:
    """Turn errors of huggingface_hub within the block into ValueError."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    other_errors: tuple[type[Exception], ...] = (
        OSError,
        *(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    )
    no_folder = f"{flag}: there is no folder {name.repository} here, and"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{flag}: {name} is gated: accept its terms at {endpoint}/{name.repository}, then log in with hf auth login or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{no_folder} {endpoint} has no model {name.repository}: check the spelling of owner and name. For a private model log in "
            "with hf auth login, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{flag}: {name.repository} has no revision {name.revision}: give a branch, a tag or a commit of {endpoint}/{name.repository}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        mode = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{endpoint} cannot be reached"
        raise ValueError(
            f"{no_folder} the cache {constants.HF_HUB_CACHE} does not hold {name} whole, and {mode}. Start once with a connection, or "
            "copy the model into a folder and name that"
        ) from error
    except unreachable() as error:
        raise ValueError(
            f"{no_folder} {endpoint} cannot be reached ({_first_line(error)}). Check the network and HF_ENDPOINT, or copy the model into "
            "a folder and name that"
        ) from error
    except other_errors as error:
        raise ValueError(f"{flag}: {name} could not be taken from {endpoint}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
