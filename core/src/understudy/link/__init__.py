"""The link between two agents: one TCP connection per pair of hosts, many conversations on it, and plain channels."""

from understudy.link.channels import PeerChannels
from understudy.link.conversation import Conversation
from understudy.link.identity import Identity, Timing
from understudy.link.links import Links
from understudy.link.peerlink import PeerLink
from understudy.link.port import Json, LostCallback, NoteHandler, PeerPort, RequestHandler

__all__ = [
    "Conversation",
    "Identity",
    "Json",
    "Links",
    "LostCallback",
    "NoteHandler",
    "PeerChannels",
    "PeerLink",
    "PeerPort",
    "RequestHandler",
    "Timing",
]
