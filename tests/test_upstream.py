"""docs/upstream.md: names here and in TorchRL, held against each other where TorchRL has them."""

import pkgutil
import re
from inspect import signature
from pathlib import Path

import pytest
import torch
import torchrl
from tensordict import TensorDict

PAGE = Path(__file__).parents[1] / "docs" / "upstream.md"
ROWS = dict(re.findall(r"^\| `(deflow_torchrl\.\w+)` \| `?([\w.]+)`? \|", PAGE.read_text(), re.M))
SAME = [name for name in ROWS if name.rpartition(".")[2] in ("FlowMatchingPolicy", "OneStepPolicy", "FQLLoss")]


def test_our_names_of_the_table_exist():
    assert len(ROWS) > 5
    assert len(SAME) == 3
    for name in ROWS:
        pkgutil.resolve_name(name.replace(".", ":", 1))


def upstream(name):
    """TorchRL's class of a row; the test is skipped where the installed version has none."""
    module, _, attribute = ROWS[name].rpartition(".")
    found = getattr(pkgutil.resolve_name(module), attribute, None)
    if found is None:
        pytest.skip(f"torchrl {torchrl.__version__} has no {ROWS[name]}")
    return found


@pytest.mark.parametrize("name", SAME)
def test_ours_takes_every_argument_of_torchrls(name):
    theirs = upstream(name)
    ours = pkgutil.resolve_name(name.replace(".", ":", 1))
    assert signature(theirs.__init__).parameters.keys() <= signature(ours.__init__).parameters.keys()


def test_fql_has_torchrls_terms_and_policies_torchrls_actions():
    from deflow_torchrl.modules import make_one_step_network, make_qvalue_networks, make_velocity_network

    kinds = {name: (pkgutil.resolve_name(name.replace(".", ":", 1)), upstream(name)) for name in SAME}
    torch.manual_seed(0)
    velocity, network, critics = (
        make_velocity_network(3, 2, (8,)), make_one_step_network(3, 2, (8,)), make_qvalue_networks(3, 2, (8,)),
    )  # fmt: skip
    batch = TensorDict(observation=torch.randn(6, 3), action=torch.rand(6, 2), batch_size=[6])
    batch["next"] = TensorDict(
        observation=torch.randn(6, 3), reward=torch.randn(6, 1), done=torch.zeros(6, 1, dtype=torch.bool),
        terminated=torch.zeros(6, 1, dtype=torch.bool), batch_size=[6],
    )  # fmt: skip
    noise, actions, losses = torch.randn(6, 2), [], []
    flows, actors, fql = (
        kinds[f"deflow_torchrl.{name}"] for name in ("FlowMatchingPolicy", "OneStepPolicy", "FQLLoss")
    )
    for flow_kind, actor_kind, loss_kind in zip(flows, actors, fql, strict=True):
        flow, actor = flow_kind(velocity, 2), actor_kind(network, 2)
        actions.append([policy(batch.copy().set("noise", noise))["action"] for policy in (flow, actor)])
        loss = loss_kind(flow, actor, list(critics))
        loss.make_value_estimator(gamma=0.99)
        terms = []
        for term in (loss.flow_loss, loss.actor_loss, loss.qvalue_loss):
            torch.manual_seed(1)
            value = term(batch.copy())
            terms.append(value[0] if isinstance(value, tuple) else value)
        losses.append(torch.stack(terms))
    torch.testing.assert_close(actions[0], actions[1])
    torch.testing.assert_close(losses[0], losses[1])
