"""Records: what a run leaves, what is refused, and what schema 3 becomes."""

import copy
import json
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("jsonschema", reason="needs the extra reports")

from deflow_torchrl.errors import InputError
from deflow_torchrl.reports import load_record, records, upgrade_record, without_places
from deflow_torchrl.reports.records import SCHEMA, config_digest
from tests.support.synthetic import CUBE2, record_of, write_run

KEPT = Path(__file__).parents[2] / "benchmarks" / "results" / "offline_to_online"


def refused(path):
    with pytest.raises(InputError) as error:
        load_record(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_schema_itself_is_valid_and_names_every_entry_of_a_record():
    from jsonschema import Draft202012Validator

    schema = json.loads(resources.files("deflow_torchrl.reports").joinpath("record.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    assert set(schema["required"]) | {"untuned"} == set(schema["properties"]) == set(record_of(5))  # older ones lack it


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = record_of(5, before=(1, 2))
    folder = write_run(tmp_path / "run", record)
    assert load_record(folder) == load_record(folder / "record.json") == record
    assert record["schema"] == SCHEMA


def test_a_record_says_what_was_run_not_where():
    record = record_of(5, task="own:/somewhere/mine")
    assert record["task"] == record["config"]["task"] == "own:mine"
    assert not {"out", "data_root"} & set(record["config"])
    assert "/somewhere" not in json.dumps(record["config"])
    elsewhere = record_of(5, task="own:/another/mine", settings={"out": "/x", "data_root": None})
    assert elsewhere["config_sha256"] == record["config_sha256"] == config_digest(record["config"])
    assert record_of(5, seed=1)["config_sha256"] != record_of(5)["config_sha256"]


def test_published_commands_name_no_folder_of_a_machine():
    command = (
        "deflow train task=own:/home/me/set data_root=/data/x out='/home/me/my runs/a' algo.lr=0.1 hidden_dims=[8,8]"
    )
    record = record_of(5, commands=[command, "deflow resume '/home/me/my runs/a'"])
    published = without_places(record)
    assert published["commands"] == [
        "deflow train task=own:set data_root=DATA out=runs/a algo.lr=0.1 'hidden_dims=[8,8]'",
        "deflow resume runs/a",
    ]
    assert published["command"] == published["commands"][0]
    assert record["command"] == command, "the run folder's own keeps what was typed"


def test_what_is_no_record_is_refused_in_one_line(tmp_path):
    assert "missing" in refused(tmp_path)
    path = tmp_path / "record.json"
    path.write_text('{"schema": 4,')
    assert "damaged: it is not JSON" in refused(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "damaged" in refused(path)
    path.write_text("[1, 2]")
    assert "schema None" in refused(path)


@pytest.mark.parametrize(("version", "advice"), [(2, "make the run again"), (3, "upgrade_record"), (5, "update")])
def test_another_schema_is_refused_with_what_to_do(tmp_path, version, advice):
    folder = write_run(tmp_path / "run", {**record_of(5), "schema": version})
    message = refused(folder)
    assert f"schema {version}, this version reads {SCHEMA}" in message
    assert advice in message


def change(record, place, value):
    *parents, name = place
    for parent in parents:
        record = record[parent]
    record[name] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("metric",), "luck"),
        (("success_timing",), "during"),
        (("seeds", "training"), -1),
        (("evaluations", "deflow", "success_rate"), 1.5),
        (("evaluations", "deflow", "success", 3), 0.5),
        (("history", 0, "phase"), "before"),
        (("config", "out"), "/somewhere"),
        (("config_sha256",), "abc"),
        (("time", "updates"), "long"),
    ],
)
def test_an_impossible_entry_is_named(tmp_path, place, value):
    record = record_of(5)
    change(record, place, value)
    assert ".".join(map(str, place[:1])) in refused(write_run(tmp_path / "run", record)).split("damaged: ")[1]


@pytest.mark.parametrize("place", ["evaluations", "history"])
def test_a_rate_that_its_episodes_do_not_have_is_refused(tmp_path, place):
    record = record_of(5, before=(1,))
    policies = record["evaluations"] if place == "evaluations" else record["history"][0]["policies"]
    policies["deflow"] = {**policies["deflow"], "success_rate": 0.9}
    message = refused(write_run(tmp_path / "run", record))
    assert f"is damaged: {place}" in message
    assert "says success_rate 0.9 of 20 episodes, its 20 episodes say 0." in message


@pytest.mark.parametrize("name", ["data", "git_commit", "acting", "history"])
def test_a_missing_entry_is_named(tmp_path, name):
    record = record_of(5)
    del record[name]
    assert f"'{name}' is a required property" in refused(write_run(tmp_path / "run", record))


def test_the_kept_records_can_be_read_and_are_what_their_schema_3_becomes():
    paths = sorted(KEPT.glob("*/record.json"))
    assert len(paths) == 4
    for path in paths:
        record = load_record(path)
        old = {**copy.deepcopy(record), "schema": 3}
        for name in ("task", "algo", "variant", "protocol", "preset", "seeds", "acting", "success_timing", "stacked"):
            del old[name]
        old["config"] |= {"out": "runs/x", "data_root": "DATA"}
        assert upgrade_record(old, variant=record["variant"]) == record
        assert record["success_timing"] == "pre", "made with ogbench 1.2"
        old["versions"]["ogbench"] = "1.1.5"
        assert upgrade_record(old, variant={})["success_timing"] == "post"
        with pytest.raises(InputError, match="only records of schema 3"):
            upgrade_record(record, variant={})


@pytest.mark.parametrize(
    ("overrides", "variant"),
    [
        ([], {}),
        (["algo=fql"], {}),
        (["preset=released"], {}),
        (["algo.gamma=0.99"], {}),
        (["algo.fixed_alpha=1", "algo.gamma=0.9"], {"fixed_alpha": 1.0, "gamma": 0.9}),
        (["algo=fql", "algo.alpha=5"], {"alpha": 5.0}),
    ],
)
def test_the_variant_is_what_neither_method_nor_task_nor_preset_gives(overrides, variant):
    pytest.importorskip("hydra", reason="needs the extra cli")
    from deflow_torchrl.runs.overrides import compose_config
    from deflow_torchrl.runs.settings import method_variant

    assert method_variant(compose_config([f"task={CUBE2}", *overrides])) == variant


def test_the_commit_outside_a_checkout_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "deflow_torchrl" / "reports" / "records.py"))
    monkeypatch.delenv("DEFLOW_COMMIT", raising=False)
    assert records.git_commit() is None
    monkeypatch.setenv("DEFLOW_COMMIT", "0123abc")
    assert records.git_commit() == "0123abc"
