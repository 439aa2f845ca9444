"""How much of the allocated cache holds no token: pages of 64 tokens against one contiguous piece a request.

Runs 200 requests of uniform random length through `CacheManager` as the engine does: admitted while there is room, the
prompt in chunks within a token budget, then token by token. No model runs, only the bookkeeping: the figures are the
same on every machine. Contiguous allocation gives every request that has begun room for the longest that is allowed.

    python benchmarks/cache_waste.py [--json] [--seed N]
"""

import argparse
import json
import random
from collections import deque
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from foveal.cache import PAGE_SIZE, CacheManager

REQUESTS = 200
LONGEST = 2048
ANSWER = 32
RUNNING = 64
TOKENS_A_STEP = 2048


@dataclass(frozen=True)
class Waste:
    """Shares, 0 to 1, of the allocated token places that hold no token; paged and contiguous over the same steps."""

    lengths: str
    paged: float
    paged_worst_step: float
    contiguous: float


@dataclass
class Request:
    """`length` tokens in all, the last ones generated."""

    key: int
    length: int
    computed: int = 0

    def next_tokens(self, budget: int) -> int:
        """How many tokens this step computes: a chunk of the prompt, or one token of the answer."""
        prompt = self.length - min(ANSWER, self.length - 1)
        return min(budget, max(1, prompt - self.computed))


def measure(longest_request: int, seed: int) -> Waste:
    """Run the requests, 1 to `longest_request` tokens each, and look at the cache after every step."""
    randomness = random.Random(seed)
    waiting = deque(Request(key, randomness.randint(1, longest_request)) for key in range(REQUESTS))
    manager = CacheManager(1 + RUNNING * LONGEST // PAGE_SIZE)
    running: list[Request] = []
    held = paged = contiguous = 0
    worst = 0.0
    while waiting or running:
        while waiting and len(running) < RUNNING:
            running.append(waiting.popleft())
            manager.admit(running[-1].key, tokens(running[-1], running[-1].length))
        step(manager, running)
        usage = manager.usage
        held += usage.tokens_held
        paged += usage.pages_in_use * PAGE_SIZE
        contiguous += LONGEST * sum(request.computed > 0 for request in running)
        worst = max(worst, usage.waste)
        for request in [request for request in running if request.computed == request.length]:
            manager.free(request.key)
            running.remove(request)
    manager.check()
    return Waste(f"1-{longest_request}", 1 - held / paged, worst, 1 - held / contiguous)


def step(manager: CacheManager, running: list[Request]) -> None:
    """Compute the next tokens of the running requests, the oldest first, within the token budget."""
    budget = TOKENS_A_STEP
    for request in running:
        if not budget:
            break
        count = request.next_tokens(budget)
        assert manager.reserve(request.key, request.computed + count), "the pool has room for all running requests"
        request.computed += count
        manager.commit(request.key, tokens(request, request.computed))
        budget -= count


def tokens(request: Request, length: int) -> range:
    """Token ids that no other request has: nothing is shared."""
    return range(request.key * LONGEST, request.key * LONGEST + length)


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of the allocated cache that holds no token.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    rows = [measure(longest, arguments.seed) for longest in (2048, 512)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    title = f"Allocated cache without a token: {REQUESTS} requests, {RUNNING} at a time, seed {arguments.seed}"
    table = Table("tokens a request", f"pages of {PAGE_SIZE}", "its worst step", f"contiguous, {LONGEST}", title=title)
    for row in rows:
        table.add_row(row.lengths, f"{row.paged:.1%}", f"{row.paged_worst_step:.1%}", f"{row.contiguous:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
