"""What is kept of a run explains it and betrays nothing."""

from __future__ import annotations

import json

import pytest

from launch.record import write_record
from launch.script import Target
from launch.secrets import clean_environment, names_of_secrets, redact

PLANTED = {
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjE2MDAwMDAwMDB9.abcdefghij",
    "NCCL_NET_PASSWORD": "correct horse",
    "HF_ENDPOINT": "https://me:sesame-open@hub.example.org/x",
    "UNKNOWN_TOOL": "nobody knows what this is",
    "SSH_AUTH_SOCK": "/tmp/ssh-77/sock",
    "LAID_PAT": "swordfish1",
}
HARMLESS = {"CUDA_VISIBLE_DEVICES": "0,1", "NCCL_DEBUG": "INFO", "PATH": "/usr/bin", "SLURM_JOB_ID": "7", "TOKENIZERS_PARALLELISM": "false"}
VALUES = [*PLANTED.values(), "sesame-open"]


def test_an_environment_keeps_what_explains_and_only_names_the_rest():
    kept = clean_environment(PLANTED | HARMLESS)
    assert kept.keys() == (PLANTED | HARMLESS).keys()
    assert not [value for value in VALUES if value in json.dumps(kept)]
    assert all(kept[name] == value for name, value in HARMLESS.items())
    assert kept["HF_ENDPOINT"] == "https://<removed>@hub.example.org/x"


@pytest.mark.parametrize(
    "text, secret",
    [
        ("export HF_TOKEN=hunter2", "hunter2"),
        ("+password: 'opensesame'", "opensesame"),
        ('"api_key": "0123456789abcdef"', "0123456789abcdef"),
        ("curl -H 'Authorization: Bearer abcdefghijkl'", "abcdefghijkl"),
        ("url = s3://key:secretsecret@host/x", "secretsecret"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
        ("x = ghp_0123456789abcdefghij", "ghp_0123456789abcdefghij"),
    ],
)
def test_secrets_are_seen_and_removed(text, secret):
    assert names_of_secrets(text)
    assert secret not in redact(text)
    assert redact(redact(text)) == redact(text)


def test_json_stays_json():
    tree = {"api_key": "0123456789abcdef", "url": "https://a:secret@b"}
    assert json.loads(redact(json.dumps(tree))) == {"api_key": "<removed>", "url": "https://<removed>@b"}


@pytest.mark.parametrize(
    "text",
    [
        "pad_token = 3",
        'count_tokens = "declared"',
        "num_tokens: int",
        "keys = model.state_dict().keys()",
        "TOKEN=$HF_TOKEN",
        "key=lambda x: x",
        "hf_hub",
        "a@b.example",
    ],
)
def test_code_is_left_as_it_is(text):
    assert redact(text) == text
    assert not names_of_secrets(text)


def test_nothing_in_a_record_is_a_secret(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("name = 'x'\n")
    target = Target("x", tmp_path / "run", tmp_path, (), "python")
    write_record(target, recipe, {"run": 1, "url": PLANTED["HF_ENDPOINT"]}, "#!/bin/bash\n", PLANTED | HARMLESS)
    names = {"changes.diff", "environment.json", "job.sh", "recipe.toml", "run.json", "version.json"}
    assert {path.name for path in target.launch.iterdir()} == names | {"logs"}
    for name in names - {"changes.diff"}:  # it may hold this very file
        text = (target.launch / name).read_text()
        assert not [value for value in VALUES if value in text], name
    assert len(json.loads((target.launch / "version.json").read_text())["commit"]) == 40
