"""No rank waits for one that has failed: an error on one rank is told to the others, once, wherever they wait.

A rank that fails takes part in the exchange that the others are in, with a refusal (``Link.refuse``): they raise
RankMismatchError there, and the group stays usable. An error that is told twice would be heard in a later exchange. So
a rank whose last exchange over the link ended in a refusal or a mismatch tells nobody: they know (``broke_off``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from syncbn import _torch
from syncbn.comm import Link
from syncbn.wire import Call

_MOST = 4000  # characters of a description: the causes of an error fit, and it fits a first message


@contextlib.contextmanager
def telling(link: Link, call: Call, width: int, what: str = "") -> Iterator[None]:
    """Within it, an exception is told to the other ranks of ``link``, unless they know of it; then it goes on.

    Args:
        link: over which the others wait, or will.
        call: what this rank would have exchanged next.
        width: of its payload. Where only sums are seen, it must travel in a message as long as the others'.
        what: that raised, for the others' message: "its loader".

    Collectives:
        None; one exchange of ``width`` float64 if an exception leaves it that the peers do not know of.
    """
    link.broke_off = False  # it told of an earlier exchange: nobody knows yet of what happens here
    try:
        yield
    except Exception as error:
        tell(error, link, call, width, what)
        raise


def tell(error: Exception, link: Link, call: Call, width: int, what: str = "") -> None:
    """Tell the other ranks of ``link`` of an error, unless they know of it: as in ``telling``, for an error at hand.

    Returns also if they cannot be told: this rank's own error is the one to mend.
    """
    if link.broke_off:
        return
    described = describe_error(error)
    # (PeerLostError, or whatever a broken backend or device says)
    with contextlib.suppress(RuntimeError), _torch.outside_modes():
        link.refuse(call, sendable(f"{what} raised {described}" if what else described), width)


def describe_error(error: BaseException) -> str:
    """``ValueError: what it says``, for another rank's message: sendable and short, whatever the error is like.

    >>> describe_error(KeyError("a bad sample"))
    "KeyError: 'a bad sample'"
    """
    try:
        text = str(error)
    except Exception as unreadable:
        text = f"(its text cannot be read: str() raised {type(unreadable).__name__})"
    return sendable(f"{type(error).__name__}: {text}")


def sendable(text: str) -> str:
    """``text`` as UTF-8 can carry it, without its middle if it is too long for a message.

    >>> sendable("disk \\udcff on fire")
    'disk \\\\udcff on fire'
    """
    if len(text) > _MOST:
        text = f"{text[: _MOST // 2]} [...] {text[-_MOST // 2 :]}"
    return text.encode(errors="backslashreplace").decode()
