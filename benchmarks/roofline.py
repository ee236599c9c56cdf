"""What an update costs at least: its matrix products and its optimiser's traffic, counted, and timed on this machine.

`throughput.py roofline` prints, for each part of a DeFlow update, the floor (every product that occurs, alone, into memory
that is there already; the optimiser's and targets' bytes at the rate of a copy), the measured time and their ratio. Products
and parts are timed in turns, round after round, so that a slow moment of the machine slows both.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deflow_torchrl.trainers import UpdateStep


@dataclass(frozen=True)
class Product:
    """``batch`` products ``[m, k] @ [k, n]``, the left or right operand transposed in memory."""

    batch: int
    m: int
    k: int
    n: int
    layout: str = "forward"  # x W^T; "input": g W; "weight": g^T x

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        left = torch.randn(self.batch, self.m, self.k, device=device)
        right = torch.randn(self.batch, self.k, self.n, device=device)
        if self.layout == "forward":
            right = right.mT.contiguous().mT
        if self.layout == "weight":
            left = left.mT.contiguous().mT
        out = torch.empty(self.batch, self.m, self.n, device=device)
        return (left, right, out) if self.batch > 1 else (left[0], right[0], out[0])


def mlp_products(
    rows: int,
    widths: Sequence[int],
    *,
    batch: int = 1,
    weights: bool = False,
    inputs: bool = False,
    first_input: int = 0,
) -> Counter[Product]:
    """Products of an MLP's forward pass and, as asked, of its gradients; ``first_input`` is how much of the input needs one."""
    found: Counter[Product] = Counter()
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        found[Product(batch, rows, fan_in, fan_out)] += 1
        if weights:
            found[Product(batch, fan_out, rows, fan_in, "weight")] += 1
        needed = fan_in if layer else first_input
        if inputs and needed:
            found[Product(batch, rows, fan_out, needed, "input")] += 1
    return found


def times(products: Counter[Product], count: int) -> Counter[Product]:
    return Counter({product: count * number for product, number in products.items()})


def update_products(
    *,
    batch_size: int,
    observation_dim: int,
    action_dim: int,
    hidden_dims: Sequence[int],
    flow_steps: int,
    critics: int = 2,
) -> dict[str, Counter[Product]]:
    """Products of each part of a full update that cannot be avoided."""
    rows, inner = batch_size, list(hidden_dims)
    velocity = [observation_dim + action_dim + 1, *inner, action_dim]
    refinement = [observation_dim + action_dim, *inner, action_dim]
    critic = [observation_dim + action_dim, *inner, 1]
    # s and s' in one pass; the observation's share of the first layer once.
    sampling = times(mlp_products(2 * rows, [action_dim + 1, *inner, action_dim]), flow_steps)
    sampling[Product(1, 2 * rows, observation_dim, inner[0])] += 1
    return {
        "flow sampling": sampling,
        "flow loss": mlp_products(rows, velocity, weights=True, inputs=True),
        "actor": mlp_products(rows, refinement, weights=True, inputs=True)
        + mlp_products(rows, critic, batch=critics, inputs=True, first_input=action_dim),
        "critic": mlp_products(rows, refinement)
        + mlp_products(rows, critic, batch=critics)
        + mlp_products(rows, critic, batch=critics, weights=True, inputs=True),
    }


def update_parts(update: UpdateStep, batch: TensorDictBase) -> dict[str, Callable[[], object]]:
    """The parts of an update as it runs, each with its share of the backward pass."""
    loss = update.learner.loss
    with loss._functional_policies():
        following = loss._next(batch)
        base, next_base = loss._base_actions(batch, following)

    def flow_sampling() -> None:
        with loss._functional_policies():
            loss._base_actions(batch, following)

    zero_grad = update.optimizer.zero_grad

    def flow_loss() -> None:
        zero_grad()
        with loss._functional_policies():
            loss._flow_term(batch).backward()

    def actor() -> None:
        zero_grad()
        with loss._functional_policies():
            loss_actor, divergence = loss._actor_term(batch, base, batch)
            (loss_actor + loss._alpha_term(batch, divergence)).backward()

    def critic() -> None:
        zero_grad()
        with loss._functional_policies():
            loss._td_terms(batch, lambda: loss._refined(following, next_base))["loss_qvalue"].backward()

    def optimiser() -> None:
        update._move_targets()
        update.optimizer.step()

    return {
        "flow sampling": flow_sampling,
        "flow loss": flow_loss,
        "actor": actor,
        "critic": critic,
        "optimiser": optimiser,
    }


def optimiser_bytes(update: UpdateStep) -> int:
    """Bytes that Adam (reads parameter, gradient and two moments, writes three) and the targets' lerp have to move."""
    trained = sum(p.numel() * p.element_size() for group in update.optimizer.param_groups for p in group["params"])
    targets = sum(
        p.numel() * p.element_size() for p in update.learner.loss.target_qvalue_network_params.values(True, True)
    )
    return 7 * trained + 3 * targets


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.matmul(left, right, out=out)


def measure(
    update: UpdateStep, batch: TensorDictBase, products: dict[str, Counter[Product]], *, rounds: int, warmup: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of floor and part, per part and of the whole: medians over rounds, and the median ratio within a round."""
    device = batch.device or torch.device("cpu")
    distinct = sorted({product for part in products.values() for product in part}, key=lambda product: product.flops)
    operands = {product: product.operands(device) for product in distinct}
    parts = update_parts(update, batch)
    traffic = optimiser_bytes(update)
    source = torch.ones(traffic // 8, device=device)  # a copy reads and writes: half the bytes each, four to a number
    target = torch.ones_like(source)

    floors: dict[str, list[float]] = {name: [] for name in (*parts, "update")}
    measured: dict[str, list[float]] = {name: [] for name in (*parts, "update")}
    for number in range(warmup + rounds):
        each = {product: clock(functools.partial(_multiply, *operand), device) for product, operand in operands.items()}
        floor = {name: sum(count * each[product] for product, count in part.items()) for name, part in products.items()}
        floor["optimiser"] = clock(lambda: target.copy_(source), device)
        floor["update"] = sum(floor.values())
        now = {}
        for name, part in parts.items():
            if name == "optimiser":  # it needs every gradient; the parts before it left one's
                update.optimizer.zero_grad()
                sum(update.learner.loss(batch)[term] for term in update.learner.loss_names).backward()
            now[name] = clock(part, device)
        update.optimizer.zero_grad()
        now["update"] = clock(lambda: update(batch), device)
        if number >= warmup:
            for name, value in floor.items():
                floors[name].append(value)
                measured[name].append(now[name])
    gflop = {
        name: sum(product.flops * count for product, count in part.items()) / 1e9 for name, part in products.items()
    }
    gflop["update"] = sum(gflop.values())
    return {
        name: {
            "gflop": gflop.get(name, 0.0),
            "mbyte": traffic / 1e6 if name in ("optimiser", "update") else 0.0,
            "floor_ms": statistics.median(values),
            "measured_ms": statistics.median(measured[name]),
            "ratio": ratio(measured[name], values),
        }
        for name, values in floors.items()
    }


def convolution_flops(encoder: nn.Module, pictures: Tensor, *, gradient: bool) -> int:
    """Floating point operations of the convolutions in an encoding and, as asked, in its gradient."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
        out = encoder(pictures)
        if gradient:
            out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "convolution" in str(operation))


def measure_encodings(
    encoder: nn.Module, pictures: Tensor, *, with_gradient: int, without: int, rounds: int, warmup: int
) -> dict[str, float]:
    """Milliseconds of so many encodings, and their convolutions at the rate of a matrix product of this machine, in turns."""
    device = pictures.device
    flops = with_gradient * convolution_flops(encoder, pictures, gradient=True)
    flops += without * convolution_flops(encoder, pictures, gradient=False)
    product = Product(1, 4096, 512, 512)
    operands = product.operands(device)

    def encode() -> None:
        for _ in range(with_gradient):
            encoder.zero_grad()
            encoder(pictures).sum().backward()
        with torch.no_grad():
            for _ in range(without):
                encoder(pictures)

    floors, measured = [], []
    for number in range(warmup + rounds):
        rate = product.flops / min(clock(functools.partial(_multiply, *operands), device) for _ in range(5))
        now = clock(encode, device)
        if number >= warmup:
            floors.append(flops / rate)
            measured.append(now)
    return {
        "gflop": flops / 1e9,
        "mbyte": 0.0,
        "floor_ms": statistics.median(floors),
        "measured_ms": statistics.median(measured),
        "ratio": ratio(measured, floors),
    }


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device synchronised at both ends."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return (time.perf_counter() - began) * 1e3


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round: what else the machine does then slows both."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_COLUMNS = {"gflop": 2, "mbyte": 0, "floor_ms": 1, "measured_ms": 1, "ratio": 2}


def table(result: dict[str, dict[str, float]]) -> str:
    lines = ["| part | GFLOP | MB | floor ms | measured ms | measured / floor |", "|---|---|---|---|---|---|"]
    for name, row in result.items():
        cells = [f"{row[column]:.{digits}f}" for column, digits in _COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
