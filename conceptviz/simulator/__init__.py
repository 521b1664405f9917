"""The ConceptViz API on this machine: for tests, for demonstrations, for working without a key or a network.

    from conceptviz.simulator import Simulator

    simulator = Simulator(speed=30)
    async with AsyncConceptViz(simulator.api_key, transport=simulator.transport()) as cv: ...

It shares no code with the client: both read the API reference on their own, so that a misread key cannot pass
unseen. Needs the extra: `pip install "conceptviz[simulator]"`.
"""

from ._faults import Fault, Faults
from ._pictures import Render, render_tiny
from ._server import run
from ._simulator import Simulator
from ._world import Account, Ledger

__all__ = ["Account", "Fault", "Faults", "Ledger", "Render", "Simulator", "render_tiny", "run"]
