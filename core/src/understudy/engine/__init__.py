"""The engine: executes the session tables on real hypervisors, devices, links and arbiters.

A `PrimarySession` or `SecondarySession` exists per guest and host; it takes events in their order, asks the tables
what follows, and carries out the effects. Nothing here decides anything: what is done with a guest is in
`understudy.session` alone.
"""

from understudy.engine.driver import Driver
from understudy.engine.primary import PrimarySession
from understudy.engine.secondary import SecondarySession
from understudy.engine.surroundings import Limits, Surroundings, Telling, Way

__all__ = ["Driver", "Limits", "PrimarySession", "SecondarySession", "Surroundings", "Telling", "Way"]
