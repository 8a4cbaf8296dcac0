"""What two agents ask each other outside of any session, and how they come to the way of one.

The conversation is named ``agent`` and is open on every link that is up.

==========  ==========================  ==================================================================
request     params                      answer
==========  ==========================  ==================================================================
``rows``                                ``rows``: what this host's table says
``look``    guest, mode                 ``facts``, ``record``, ``digest``, ``agent`` for a preflight
``probe``   guest, mode, peer_facts     ``findings`` of the secondary's side
``join``    guest, session, mode        an engine for the copy waits in the session's conversation
``settle``  guest, session              ``state``, when nothing of the session is under way here any more
``defer``   guest                       this host lets the other one take the guest first
``yield``   guest, session              the owner has ended the protection on the other agent's wish
==========  ==========================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from understudy.agent.faults import finding_of
from understudy.device import Finding, Mode
from understudy.engine import Way
from understudy.errors import LinkLost
from understudy.link import Conversation, PeerChannels, PeerLink

__all__ = ["RemoteHost", "open_way"]

Json = Mapping[str, Any]

LOOK_LIMIT_S = 12.0


class RemoteHost:
    """The other host's half of a preflight (`understudy.preflight.OtherHost`).

    Args:
        link: The link to it.
        agent: The conversation of the agents, ``None`` while the link is down.
    """

    def __init__(self, link: PeerLink, agent: Conversation | None) -> None:
        self.name = link.name
        self._link = link
        self._agent = agent

    async def ask(self, method: str, params: Json, *, timeout_s: float) -> Json:
        """Ask the other agent.

        Raises:
            LinkLost: There is no link, or no answer.
            PeerError: It refused.
        """
        if self._agent is None or self._agent.lost is not None:
            raise LinkLost(f"there is no link to {self.name}: {self._link.problem or 'it is being made'}")
        return await self._agent.request(method, params, timeout_s=timeout_s)

    async def look(self, guest: str, mode: Mode) -> Json:
        """Return the other host's facts; see `understudy.preflight.OtherHost.look`."""
        return await self.ask("look", {"guest": guest, "mode": mode.value}, timeout_s=LOOK_LIMIT_S)

    async def probe(self, guest: str, mode: Mode, peer_facts: Json) -> Sequence[Finding]:
        """Return the other host's findings; see `understudy.preflight.OtherHost.probe`."""
        params = {"guest": guest, "mode": mode.value, "peer_facts": dict(peer_facts)}
        answer = await self.ask("probe", params, timeout_s=LOOK_LIMIT_S)
        return [finding_of(row) for row in answer["findings"]]


def open_way(link: PeerLink, guest: str, session: str, local_address: str) -> Way:
    """Open the conversations of one session on a link that is up.

    Raises:
        LinkLost: It is not.
    """
    port = link.open(f"session/{guest}/{session}")
    channels = PeerChannels(link.open(f"session/{guest}/{session}/channels"), local_address, link.address)
    port.closing.append(channels.close)
    return Way(port, channels, link.address)
