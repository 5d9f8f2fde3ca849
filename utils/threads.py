"""How long the threads of one process wait for each other before they sleep. To be imported before torch, whose OpenMP
reads this when it is loaded.

By itself that runtime has a thread that waits turn round some 300,000 times, several milliseconds, before it lets
another have the core. Beside a process that wants a core too, every wait then lasts until the system takes the core
away, and a run of thousands of short parallel loops takes ten to a hundred times as long. A thread that sleeps early is
woken as soon as its turn comes. What the user has set stays.
"""

import os

SPINS = 1000  # some 20 microseconds


def sleep_early() -> None:
    """Have libgomp's threads wait SPINS turns, unless the environment says how they are to wait."""
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


sleep_early()
