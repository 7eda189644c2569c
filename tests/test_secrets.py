"""No secret stands in a setting, in a file or in what is printed."""

from __future__ import annotations

import io
import pickle
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from residual_saes.conf import command as command_line
from residual_saes.conf.names import require_no_secret
from residual_saes.conf.ray_ranks import main
from residual_saes.data import secrets
from residual_saes.data.errors import SettingError, first_line
from residual_saes.data.journal import show, tell
from residual_saes.data.store.place import place_of
from tests.conftest import Call
from tests.train.test_command import SMALL, make_store

CANARY = "Kanarie17Kanarie17Kanarie"
ROOT = Path(__file__).parent.parent
URLS = [
    f"s3://KEY:{CANARY}@bucket/store",
    f"s3://{CANARY}@bucket/store",
    f"s3://{CANARY}:@bucket",
    f"s3://AKIA:a/{CANARY}/b+c@bucket/store",
    f"S3://KEY%3A{CANARY}%40bucket/store",
    f"s3://KEY%253A{CANARY}%2540bucket/store",
    f"s3:/KEY:{CANARY}@bucket/store",
    f"az://container/store?sv=2024&sig={CANARY}",
    f"gs://bucket/store%3Fsig%3D{CANARY}",
    f"gs://bucket/store#{CANARY}",
    f"https://bucket.example/store?X-Amz-Signature={CANARY}",
    f"file:///tmp/store?token={CANARY}",
    f"s3://bucket/hf_{CANARY}",
]


@pytest.mark.parametrize("url", URLS)
def test_a_place_has_no_user_no_query_and_no_fragment(url: str) -> None:
    with pytest.raises(SettingError, match="store=") as refused:
        place_of(url)
    assert CANARY not in str(refused.value)
    for setting in ("store", "run", "out", "repo", "text.path", "model.path", "runs", "+start"):
        if setting == "+start" and "#" in url:
            continue  # no place that has a scheme
        for value in (url, f"'{url}'", f"[a,{url}]", f"a,{url}"):
            with pytest.raises(SettingError) as refused:
                require_no_secret([f"{setting}={value}"])
            assert CANARY not in str(refused.value)


OVERRIDES = [
    f"+token={CANARY}",
    f"++hf_token={CANARY}",
    f"+wandb.api_key={CANARY}",
    f"+auth={{user:a,password:{CANARY}}}",
    f"hydra.job.env_set.HF_TOKEN={CANARY}",
    f"text=hf_{CANARY}",
    f"hf_{CANARY}",
    f"+hf_{CANARY}=1",
    f"--hf_{CANARY}",
    f"seed=1,hf_{CANARY}",
    f"model.path=https://user:{CANARY}@huggingface.co/a/b",
    f"run={CANARY}-of-the-environment",
    "run=${oc.env:HF_TOKEN}",
]


@pytest.mark.parametrize("command", ["harvest", "train", "analyze", "export", "publish"])
def test_a_command_line_with_a_secret_is_one_line_and_leaves_nothing(
    command: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Hydra and the command's own libraries load: no file, and no module either."""
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}-of-the-environment")
    for override in [*OVERRIDES, f"store={URLS[0]}"]:
        for options in ((), ("-m",), ("--cfg", "job"), ("--help",)):
            code, err = call(command, "no.such.module", *options, override)
            assert (code, err.count("\n")) == (2, 1), err
            assert err.startswith("error: ") and CANARY not in err
    assert not list(tmp_path.iterdir())


def test_what_is_no_secret_passes() -> None:
    require_no_secret(
        [
            *("store=s3://bucket/a@b/c", "run=runs/a#b?c", "run='runs/x:y@z'", "-m"),
            *("model.path=google/gemma-4-E4B", "start=saelens:/data/a#b", "text.max_tokens=5"),
            *("run=runs/hf_small", "text=The bearer of news: https://a.example/x?q=1&page=2#end"),
            *("tokens=1e9", "answers.new_tokens=5", "drop_tokens=[1,2]", "hydra/launcher=slurm"),
        ]
    )
    for file in (ROOT / "conf").rglob("*.yaml"):
        for settings in yaml.safe_load_all(file.read_text()):
            if "kind" not in settings and "envs" not in settings:  # of Kubernetes, of SkyPilot
                assert secrets.kind_in_settings(settings) is None, file


@pytest.mark.parametrize("part", ["a", "a://", "a://b:", "?a_", "&token", "%25", "bearer "])
def test_long_lines_take_no_long_time(part: str) -> None:
    """Where a pattern begins anew at each letter, this takes minutes."""
    text = part * (100_000 // len(part))
    assert secrets.redacted(text) == text
    secrets.kind_in_url(f"s3://{text}")


def test_a_setting_that_a_file_brings_is_checked_too(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine.yaml").write_text("path: x/${oc.env:AWS_SECRET_ACCESS_KEY}\n")
    code, err = call(
        "harvest", "residual_saes.harvest.command", "--config-dir", str(tmp_path), "text=mine"
    )
    assert code == 2 and "text.path=" in err and CANARY not in err


def test_the_environment_stays_there(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With canaries in it: a run, a sweep and a release, and all that is printed."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    for name in ("AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_API_KEY", "WANDB_API_KEY", "SECRET_OF_MINE"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text(f"hf_{CANARY}")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hub" / "token"))
    make_store(tmp_path / "s.zarr", units=3, layers=(3,))
    said = io.StringIO()
    sweep = ("-m", "store=s.zarr", *SMALL, "tokens=64", "seed=1,2", "run=runs")
    for name, module, *arguments in (
        ("harvest", "residual_saes.harvest.command", "action=status", "store=s.zarr"),
        ("train", "residual_saes.train.command", *sweep),
        ("train", "residual_saes.train.command", "--cfg", "all", "store=s.zarr"),
        ("publish", "residual_saes.train.publish.command", "run=runs/seed-1", "repo=a/b"),
    ):
        with redirect_stdout(said):
            said.write(call(name, module, *arguments)[1])
    (tmp_path / "hub" / "token").unlink()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"multirun.yaml", "config.yaml", "README.md"} <= {path.name for path in written}
    for path in written:
        assert CANARY.encode() not in path.read_bytes(), path
        assert CANARY not in str(path)
    assert "3 of 3 units" in said.getvalue() and CANARY not in said.getvalue()


# What libraries raise and say.
ECHOES = [
    f"error for url (https://a.blob.example/c/k?sv=2024&sig={CANARY}%2Fx&se=2030)",
    f"GET http://user:{CANARY}@127.0.0.1:9/b/k failed",
    f"Illegal header value b'Bearer {CANARY}'",
    f"{{'authorization': 'Basic {CANARY}'}}",
    f"AccountName=a;AccountKey={CANARY}==;EndpointSuffix=core.windows.net",
    f"hf_{CANARY} is not allowed",
    f"got {CANARY}-of-mine where a number must be",
]


class Answer(Exception):
    """An error of a library whose text is made when it is asked for."""

    def __str__(self) -> str:
        return ECHOES[0]


@pytest.mark.parametrize("echo", ECHOES)
def test_what_a_library_says_is_cleaned(
    echo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed, quoted in an error, in a traceback, and in what a launcher pickles and logs."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-of-mine")
    tell(echo)
    show(echo)
    with pytest.raises(SystemExit):
        command_line.run_command(lambda: failing(SettingError(echo)))
    sys_hook(RuntimeError(echo))
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err
    assert "Traceback" in said.err and said.err.count(secrets.MASK) >= 3
    assert CANARY not in first_line(OSError(echo))
    for error in (SettingError("x"), RuntimeError(echo), Answer(), OSError(5, echo)):
        error.__cause__ = ValueError(echo)
        clean = secrets.cleaned(error)
        assert CANARY not in "".join(traceback.format_exception(clean))
        assert CANARY.encode() not in pickle.dumps(clean)
    assert type(secrets.cleaned(SettingError(echo))) is SettingError


def failing(error: Exception) -> None:
    raise error


def sys_hook(error: Exception) -> None:
    """What the interpreter does with a defect once a command has begun."""
    try:
        raise error
    except Exception:
        command_line.print_defect(*sys.exc_info())


def test_an_error_without_secrets_keeps_its_causes() -> None:
    error = SettingError("x")
    error.__cause__ = ValueError("y")
    assert secrets.cleaned(error) is error and error.__cause__ is not None


def test_ray_logs_the_environment_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(tasks=[])
    ray.init = lambda address, runtime_env: ray.__setattr__("logged", runtime_env["env_vars"])
    ray.remote = lambda **_: (
        lambda _: SimpleNamespace(remote=lambda *given: ray.tasks.append(given))
    )
    ray.get = lambda tasks: [0 for _ in tasks]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://a:{CANARY}@host")
    with pytest.raises(SystemExit):
        main("2", "store=s3://bucket/store")
    assert ray.logged["AWS_REGION"] == "here" and CANARY not in str(ray.logged)
    assert [str(task).count(CANARY) for task in ray.tasks] == [2, 2]
    with pytest.raises(SettingError):
        main("2", f"store={URLS[0]}")


def test_a_bucket_behind_an_address_with_a_password(
    monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    from residual_saes.data.store import bucket

    monkeypatch.setattr(bucket, "RETRIES", {"max_retries": 0})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{CANARY}@127.0.0.1:9")
    code, err = call("train", "residual_saes.train.command", "store=s3://bucket/store", *SMALL)
    assert (code, err.count("\n")) == (75, 1) and CANARY not in err, err
