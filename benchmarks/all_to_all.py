"""Flat and two-stage dispatch to experts over slow links between nodes: bytes that cross and time, on one machine.

    sudo .venv/bin/python benchmarks/all_to_all.py [--tokens 512] [--slow-mbit 100] [--fast-mbit 1000] [--rounds 3]

Needs root, `ip` and `tc`: nodes are network namespaces with links of a given rate (emulated_nodes.py), 8 ranks as 2
nodes of 4 and as 4 nodes of 2. Every token goes to 8 of 64 experts on a limited number of nodes; rows are FP8 (E4M3 and
a scale for 128 numbers). The experts return what they get: nothing is timed but travel.

`payload` is what the ranks count themselves, `bound` a row in FP8 for every token and other node that holds some of its
experts; the two-stage route sends the gate's choice and weights with it, 8 bytes an expert chosen. `link` is what the
kernel counts on the slow links for dispatch and combination together, headers included. Times are medians of rounds, of
the slowest rank: `dispatch` until rows have arrived at the experts, `and back` until outputs are back (in BF16).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emulated_nodes import LINK, Node, emulated, require_root

from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import Format
from octofold.kernels.registry import Kernels, Workload, choose
from octofold.parallel.expert import ExchangedExperts, FlatExperts, Routing
from octofold.parallel.expert_two_stage import TwoStageExperts
from octofold.parallel.transport import Transport

RANKS, EXPERTS, CHOSEN, HIDDEN = 8, 64, 8, 2048
FP8 = Format((1, 128))
ROUTES: dict[str, type[ExchangedExperts]] = {"flat": FlatExperts, "two-stage": TwoStageExperts}
CASES = [(2, 4, 2), (4, 2, 2), (4, 2, 4)]
"""Nodes, ranks of each, nodes that a token may reach."""


def choices(tokens: int, nodes: int, limit: int, seed: int) -> torch.Tensor:
    """int64 [tokens, CHOSEN]: different experts of `limit` nodes."""
    generator = torch.Generator().manual_seed(seed)
    node_of_E = torch.arange(EXPERTS) // (EXPERTS // nodes)
    allowed_TP = torch.rand(tokens, nodes, generator=generator).argsort(1) < limit
    scores_TE = torch.rand(tokens, EXPERTS, generator=generator)
    return scores_TE.masked_fill(~allowed_TP[:, node_of_E], -1.0).topk(CHOSEN, dim=1).indices


class Echo:
    """Experts that return their rows, and note when they were called."""

    def __init__(self) -> None:
        self.called_s = 0.0

    def __call__(self, x_ND: torch.Tensor, counts_E: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        self.called_s = time.perf_counter()
        return x_ND


def rank_main(options: argparse.Namespace) -> None:
    """What each rank does: rounds of both routes in turn; rank 0 prints the results as one line of JSON a round."""
    # A rank that fails ends the others: they wait for it no longer than this.
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    torch.set_num_threads(1)
    nodes = tuple(number // options.ranks_per_node for number in range(RANKS))
    kernels, _ = choose(KernelsConfig(), Workload("cpu", torch.bfloat16, formats=(FP8,)))
    experts_TK = choices(options.tokens, options.nodes, options.limit, rank)
    weights_TK = torch.full(experts_TK.shape, 1 / CHOSEN)
    routing = Routing(experts_TK, weights_TK, torch.bincount(experts_TK.flatten(), minlength=EXPERTS))
    x_TD = torch.randn(options.tokens, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    reached = (experts_TK // (EXPERTS // options.nodes)).sort(1).values
    places = (reached.diff(dim=1) != 0).sum() + len(reached) - (reached == nodes[rank]).any(1).sum()
    for number in range(options.rounds + 1):
        for name, route_class in ROUTES.items():
            route, echo = route_class(world, nodes=nodes), Echo()
            route.transport = Transport(FP8, FP8)
            print_on(rank, {"mark": f"{number} {name}"})
            began_s = time.perf_counter()
            with torch.no_grad():
                y_TD, _ = route(echo, x_TD, routing, kernels, lambda: None)
            ended_s = time.perf_counter()
            assert (y_TD.float() - x_TD.float()).norm() < 0.05 * x_TD.float().norm(), "experts return what they get"
            slowest_s = torch.tensor([echo.called_s - began_s, ended_s - began_s])
            dist.all_reduce(slowest_s, op=dist.ReduceOp.MAX)
            sent = torch.tensor([route.traffic.take()["network_dispatch"], float(places) * row_bytes()])
            dist.all_reduce(sent)
            found = dict(zip(("dispatch_s", "whole_s"), slowest_s.tolist(), strict=True))
            found |= dict(zip(("payload", "bound"), sent.tolist(), strict=True))
            print_on(rank, {"round": number, "route": name, **found})
    dist.destroy_process_group()


def row_bytes() -> int:
    """A token in FP8 with its scales."""
    return HIDDEN + FP8.tiles(1, HIDDEN)[1] * FP8.scale_dtype.itemsize


def print_on(rank: int, line: dict[str, Any]) -> None:
    """Rank 0 tells the parent, which reads the links' counters meanwhile; everybody waits for that."""
    if rank == 0:
        print(json.dumps(line), flush=True)
        sys.stdin.readline()
    dist.barrier()


def measure(options: argparse.Namespace, nodes: list[Node], per_node: int, limit: int) -> list[dict[str, Any]]:
    """Start the ranks inside the nodes; the results of every round but the first."""
    shape = ["--nodes", str(len(nodes)), "--ranks-per-node", str(per_node), "--limit", str(limit)]
    rest = ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
    processes = []
    for rank in range(RANKS):
        node = nodes[rank // per_node]
        environ = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
        environ |= {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": "29571", "GLOO_SOCKET_IFNAME": LINK}
        command = node.command(sys.executable, str(Path(__file__).resolve()), "--as-rank", *shape, *rest)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} if rank == 0 else {}
        processes.append(subprocess.Popen(command, env=environ, text=True, **pipes))
    try:
        results = _listen(processes[0], nodes)
        failed = [rank for rank, process in enumerate(processes) if process.wait(60)]
        assert not failed, f"ranks {failed} failed"
    finally:
        for process in processes:
            process.kill()
    return [result for result in results if result["round"] > 0]


def _listen(first: "subprocess.Popen[str]", nodes: list[Node]) -> list[dict[str, Any]]:
    assert first.stdout is not None
    assert first.stdin is not None
    results, before = [], 0
    for line in first.stdout:
        said = json.loads(line)
        sent = sum(node.sent_bytes() for node in nodes)
        if "mark" in said:
            before = sent
        else:
            results.append({**said, "link": sent - before})
        first.stdin.write("\n")
        first.stdin.flush()
    return results


def report(results: list[dict[str, Any]], shape: str) -> None:
    """One line a route."""
    medians = {}
    for name in ROUTES:
        of_route = [result for result in results if result["route"] == name]
        keys = ("payload", "bound", "link", "dispatch_s", "whole_s")
        medians[name] = {key: statistics.median(result[key] for result in of_route) for key in keys}
    flat = medians["flat"]
    for name, m in medians.items():
        print(
            f"{shape:22} {name:10} {m['payload'] / 1e6:9.2f} {m['bound'] / 1e6:9.2f} {m['payload'] / m['bound']:7.3f} "
            f"{m['link'] / 1e6:9.2f} {m['dispatch_s']:10.3f} {flat['dispatch_s'] / m['dispatch_s']:7.2f}x "
            f"{m['whole_s']:10.3f} {flat['whole_s'] / m['whole_s']:7.2f}x"
        )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--slow-mbit", type=int, default=100, help="rate of a node's link to the others")
    parser.add_argument("--fast-mbit", type=int, default=1000, help="rate inside a node")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    for name in ("--nodes", "--ranks-per-node", "--limit"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        rank_main(options)
        return
    require_root()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}, gloo")
    print(
        f"{RANKS} ranks, {options.tokens} tokens each, hidden {HIDDEN}, {CHOSEN} of {EXPERTS} experts, FP8; "
        f"{options.slow_mbit} Mbit/s between nodes, {options.fast_mbit} Mbit/s inside"
    )
    print(f"{'nodes':22} {'route':10}{'payload MB':>10}{'bound MB':>10}{'ratio':>8}{'link MB':>10}", end="")
    print(f"{'dispatch s':>11}{'gain':>9}{'and back s':>11}{'gain':>9}")
    for nodes, per_node, limit in CASES:
        with emulated(nodes, slow_mbit=options.slow_mbit, fast_mbit=options.fast_mbit) as made:
            results = measure(options, made, per_node, limit)
        report(results, f"{nodes} of {per_node}, limit {limit}")


if __name__ == "__main__":
    main()
