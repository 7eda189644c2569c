"""Runs every command of README.md and docs/ in small: page by page, in the page's order.

A command is `residual-saes harvest|train|analyze|export|publish` with settings, or `python -m` with
its module, in a block or in a sentence, also behind torchrun and accelerate. It runs in this
process, because a new one takes seconds to start, in a directory of its page, on the embedded
model. `smaller` says what is changed for that. All else stays as it is written, so that a setting,
study or value of another name fails here.

- torchrun, accelerate: this process is rank 0 of as many as they would start. It is alone where the
  ranks would meet in one run.
- conf/slurm.sbatch, conf/ray_ranks.py: this process runs the settings, as one rank.
- `hydra/launcher=NAME`: the launcher's settings must compose. Hydra's basic launcher then runs the
  jobs one by one.
- s3://: moto's server on loopback. The other rank of a bucket never comes, so it is given up at
  once.
- The embedded model is as base models are, without chat template, on the pages of one.
- This process reads the text, which is otherwise a process of its own.
- `action=serve`: the pages must be there; they are not served.
- A harvest into a store that is there, without `tokens=`: it takes model and text from the store.
- `...` after a command: the settings in OMITTED.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest

import residual_saes.analyze.pages.browser.serve
from residual_saes.data.site import RESID_POST, HookPoint
from residual_saes.data.store import bucket as objects
from residual_saes.data.store.store import Store
from residual_saes.data.tiny import problems
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest import hub_model, spine
from residual_saes.train import stream
from tests.harvest.spine_here import SpineHere
from tests.test_house import ROOT

pytestmark = pytest.mark.docs
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What one word of a command becomes, by patterns of the whole word.
SUBSTITUTES = {
    # layers that make and that share keys and values, as these do
    r"layer=\[21,27\]": "layer=[5,8]",
    r"layer=21": "layer=5",
    r"layer=27": "layer=8",
    r"study\.layer=27": "study.layer=8",
    r"study\.layers=\[14,21,27\]": "study.layers=[8]",
    r"layer=12": "layer=6",
    r"layer=(\[)?0,1,2,3,4,5,6,7,8,9,10,11(\])?": r"layer=\g<1>0,5\g<2>",
    r"(runs=.*)_L21": r"\1_L5",  # a directory that is named after its layer
    r"tokens=(1e9|1e7|1e6|1\.2e6|6e5|4e5)": "tokens=2048",
    r"rank=range\(0,\d+\)": "rank=range(0,1)",
    r"optim\.lr=1e-4,2e-4,4e-4": "optim.lr=1e-4,4e-4",
    r"sae\.aux_coef=0,0\.03125,0\.125": "sae.aux_coef=0,0.125",
    r"device=cuda:\d": "device=cpu",
    r"model\.path=(DIR|models/mine)": "model.path=models/mine model.dtype=float32",
    r"text\.path=FILES": "text.path=books",
    r"text\.path=traces": "text.path=books",
    r"text=\[fineweb_edu,finemath\]": "text=[fineweb_edu,finemath] "
    "text.sources.fineweb_edu.dataset=hub/web text.sources.fineweb_edu.config=null "
    "text.sources.finemath.dataset=hub/math text.sources.finemath.config=null",
    r"study\.lr=\[3e-5,1e-4\]": "study.lr=[1e-4]",
    r"study\.batch=16": "study.batch=2",
    r"study\.steps=20": "study.steps=1",
    r"study\.tokens=6000": "study.tokens=100",
    r"answers\.questions=(100|50)": "answers.questions=20",
    r"answers\.questions=400": "answers.questions=40",
    r"answers\.new_tokens=64": "answers.new_tokens=22",
    r"study\.processes=2": "study.processes=1",
    r"hydra/launcher=\w+": "hydra/launcher=basic",
    r"feature=(161|71)": "feature=16",
    r"hydra\.launcher\..*": "",
}
# What is added to a command, by its module or a word of it, unless it sets the same thing.
ADDED = {
    "harvest": "model=tiny text=tiny tokens=2048 context=128 unit=512 batch=4 device=cpu",
    "train": "sae.d_sae=64 sae.k=4 sae.k_aux=8 batch=256 device=cpu",
    "analyze": "device=cpu",
    "study=gsm8k": "answers.new_tokens=5",
    "study=contrast": "answers.questions=20 answers.new_tokens=22 study.permutations=19 "
    "study.min_firing=1",
    "study=steering": "answers.questions=12 answers.new_tokens=5 study.scales=[5] "
    "study.n_random=1 study.n_shuffled=1",
    "study=intervene": "answers.questions=20 answers.new_tokens=5 study.changes=[ablate] "
    "study.n_features=1 study.n_random=1 study.min_firing=1",
    "study=splice": "study.tokens=100",
    "study=probes": "answers.questions=160 study.k=[1] study.seeds=1 study.draws=20 "
    "study.permutations=1",
    "study=stage_gate": "answers.questions=20 answers.new_tokens=22 study.draws=20 "
    "study.min_firing=1",
    "study=stage_gate_2": "answers.questions=40 answers.samples=2 answers.new_tokens=22 "
    "study.seeds=1 study.rewards=[R0,R1] study.levels=[token] study.canaries=2 study.text=100",
    "study=synth": "study.objectives=[topk] study.k=[3] study.seeds=2 study.tokens=1024 "
    "study.rows=500",
    "study=rollouts": "answers.questions=20 answers.new_tokens=22 study.draws=20 "
    "study.min_firing=1",
    "study=reason_score": "study.words=[more,left]",
    "study=steer": "study.new_tokens=2",
    "study=all": "answers.questions=20 ~study.gsm8k ~study.steering study.contrast.permutations=19 "
    "study.contrast.min_firing=1 study.stage_gate.min_firing=1 study.stage_gate.draws=20 "
    "study.logit_lens.prompts=2 study.splice.tokens=100 study.reason_score.words=[more,left]",
}
# Steering writes every answer a dozen times. Labelled solutions make its vector, so that answers
# may be short. All studies together generate none.
LABELLED = {
    "problems=gsm8k/test.jsonl": "problems=labelled/test.jsonl",
    "problems=gsm8k": "problems=labelled",
}
REPLACED = dict.fromkeys(
    ("study=steering", "study=intervene", "study=stage_gate", "study=all"), LABELLED
)
# Nothing is drawn where solutions are labelled.
REPLACED["problems=gsm8k"] = {
    "answers.samples=8": "answers.samples=1",
    "answers.temperature=1": "answers.temperature=0",
}
OMITTED = {  # what `...` stands for
    "harvest": "layer=5 store=activations/e4b.zarr",
    "train": "layer=5 store=activations/e4b.zarr run=runs/omitted",
}
# Files that start ranks with the settings behind them: tests/engines starts them for real.
BY_ENGINE = re.compile(
    r"(?:sbatch \S+ \S+/slurm\.sbatch|python -m (?:residual_saes\.)?conf\.ray_ranks \d+) (.*)"
)
NAMES = "harvest|train|analyze|export|publish"
# What stands before a command's name, with the number of processes.
STARTED = r"(?:residual-saes |(?:python|(?:torchrun|accelerate launch) \S+ (\d+)) -m )"
# Not run here: modules that are named alone, and benchmarks, which tests/test_docs.py looks up.
OTHER = re.compile(
    r"python -m ((harvest|train|analyze)(\.export)?|(tests|data)\..*)"
    rf"|residual-saes(?: (?:{NAMES}|help|help {NAMES}|--help|--version|completion \w+))?"
)
# Pages that go on from a store and a run of another page, and how those are made.
BEGINNING = {
    "harvest": "layer=[21,27] tokens=1e9",
    "train": "sae=topk_32k layer=21 run=runs/e4b_L21",
}
CONTINUED = (
    "browser.md",
    "compare.md",
    "pages.md",
    "problems.md",
    "rewards.md",
    "store.md",
    "studies.md",
    "training.md",
)
# Pages whose model is google/gemma-4-E4B, a base model: its tokenizer has no chat template.
OF_A_BASE_MODEL = (
    "README.md",
    "browser.md",
    "compare.md",
    "pages.md",
    "problems.md",
    "reproduce.md",
    "rewards.md",
    "studies.md",
)


class Command(NamedTuple):
    """One command of a page."""

    written: str  # as the page has it
    world: int  # processes that torchrun or accelerate would start; 0: neither is there
    module: str
    words: list[str]


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """The code of a page in its order, as (language, text).

    The language is that of a fenced block; it is empty for an indented line or inline code.
    """
    text = text.replace("\\\n", " ")
    text = re.sub(r"`(?:\\`|[^`])*\\`(?:\\`|[^`])*`", "", text)  # messages that quote a command
    pattern = r"^```(\w+)\n(.*?)^```|^ {4}(\S[^\n]*)|(?<!`)`([^`]+)`"
    for language, block, indented, inline in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        yield language, block or indented or " ".join(inline.split())


def lines(text: str) -> Iterator[str]:
    """A page's lines for a shell, and its Python blocks whole."""
    for language, code in pieces(text):
        if language == "python":
            yield code
        elif language in ("", "sh"):
            yield from (line.split("  #")[0].strip() for line in code.splitlines())


def parsed(line: str) -> Command | None:
    """The command in a line; None if it is none of ours, or has no settings.

    One that is to run beside the next one runs before it.
    """
    line = line.removesuffix(" &")
    if match := BY_ENGINE.fullmatch(line):
        return Command(line, 0, "harvest", shlex.split(match[1]))
    match = re.fullmatch(rf"{STARTED}(?:residual_saes\.)?(?:train\.)?({NAMES}) (.*)", line)
    if match is None:
        return None
    module = f"train.{match[2]}" if match[2] in ("export", "publish") else match[2]
    return Command(line, int(match[1] or 0), module, shlex.split(match[3]))


def commands(text: str) -> list[Command]:
    return [command for line in lines(text) if "\n" not in line and (command := parsed(line))]


def smaller(command: Command) -> list[str]:
    """The command's words for the embedded model."""
    words: list[str] = []
    for word in command.words:
        changed = OMITTED[command.module] if word == "..." else word
        for pattern, substitute in SUBSTITUTES.items():
            if re.fullmatch(pattern, word):
                changed = re.sub(pattern, substitute, word)
        # A word with a space in it stays one.
        words += changed.split() if changed != word else [word]
    for key in command.words:
        replaced = REPLACED.get(key, {})
        words = [replaced.get(word, word) for word in words]
    added = dict(ADDED)
    if recalls(command):
        added["harvest"] = "device=cpu"
    for key in (command.module, *command.words):
        words += [
            more for more in added.get(key, "").split() if not sets(words, more.partition("=")[0])
        ]
    return words


def recalls(command: Command) -> bool:
    """Whether a harvest takes its model, text and tokens from the store that is there."""
    store = Path(setting(command.words, "store", "none"))
    return command.module == "harvest" and store.is_dir() and not sets(command.words, "tokens")


def sets(words: list[str], name: str) -> bool:
    """Whether a setting, or `text.path` and `model.path` in the place of its group, is among the
    words.
    """
    return any(word.startswith((f"{name}=", f"{name}.path=")) for word in words)


# -- a page's directory ----------------------------------------------------------------------------


def furnish(folder: Path) -> None:
    """Write what the pages take for granted: texts, chats, problems, a model, data sets."""
    some = list(islice(problems.problems("heldout"), 60))
    texts = [problems.document(problem) for problem in some]
    unique = list({problem.question: problem for problem in some}.values())
    for name, own in (("train", unique[30:]), ("test", unique[:30])):
        plain = [{"question": p.question, "answer": problems.solution(p)} for p in own]
        write_lines(folder / f"gsm8k/{name}.jsonl", plain)
        write_lines(folder / f"labelled/{name}.jsonl", [labelled(problem) for problem in own])
    write_lines(folder / "notes.jsonl", [{"body": text} for text in texts])
    write_lines(folder / "books/second.jsonl", [{"text": text} for text in texts[30:]])
    (folder / "books/first.txt").write_text("\n\n".join(texts[:30]))
    write_lines(folder / "hub/web/train.jsonl", [{"text": text} for text in texts])
    write_lines(folder / "hub/math/train.jsonl", [{"text": text} for text in texts[30:]])
    shutil.copytree(MODEL_DIR, folder / "models/mine")


def labelled(problem: problems.Problem) -> dict[str, Any]:
    """A problem with a right and a wrong solution."""
    right = {"solution": f"#### {problem.answer}", "is_correct": True}
    wrong = {"solution": f"#### {problem.answer + 7}", "is_correct": False}
    truth = {"question": problem.question, "ground_truth": str(problem.answer)}
    return {**truth, "a": right, "b": wrong}


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a page, furnished; this process plays the parts of others."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as the commands set it themselves, for good
    monkeypatch.setattr(gc, "collect", lambda: 0)  # 0.2 s a model in a large process
    monkeypatch.setattr(spine, "SpineProcess", SpineHere)
    monkeypatch.setattr(spine, "is_small", lambda *_: False)
    monkeypatch.setattr(residual_saes.analyze.pages.browser.serve, "serve", require_site)
    return tmp_path


def require_site(folder: Path, *_: Any) -> None:
    assert (folder / "index.html").is_file()


@pytest.fixture(scope="module")
def s3() -> Iterator[Callable[[pytest.MonkeyPatch], None]]:
    """A function that sets the environment for a bucket `my-bucket` on a server of its own."""
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("obstore", reason="obstore is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    urlopen(Request(f"{url}/my-bucket", method="PUT"))

    def environment(monkeypatch: pytest.MonkeyPatch) -> None:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        for name, value in {"AWS_ENDPOINT_URL": url, **keys}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            objects, "RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=2)}
        )

    yield environment
    server.stop()


# -- running ---------------------------------------------------------------------------------------


class Shell:
    """Runs commands in this process, and checks their results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys

    def run(self, command: Command) -> None:
        require_launcher(command)
        words = smaller(command)
        stream.store_at.cache_clear()  # a new process has seen no store
        stream.rows_of.cache_clear()
        with self._patch.context() as patch:
            if command.world:
                meet = command.module == "train" and "-m" not in words
                patch.setenv("RANK", "0")
                patch.setenv("WORLD_SIZE", "1" if meet else str(command.world))
            patch.setattr(sys, "argv", [command.module, *words])
            before = self._capsys.readouterr()  # of the command before
            code = called(command.module)
        out, err = self._capsys.readouterr()
        shown = (command.written, f"as {' '.join(words)}", before.err[-300:], err)
        assert code in (None, 0), "\n".join(shown)
        require_outcome(command, words, out, err)


def called(module: str) -> Any:
    """What `python -m MODULE` exits with."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        return stopped.code
    return 0


def require_launcher(command: Command) -> None:
    """Require that the launcher's settings compose, where it is installed."""
    from hydra import compose, initialize_config_module

    asked = [word for word in command.words if word.startswith("hydra")]
    if not asked:
        return
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        assert compose(command.module, asked, return_hydra_config=True).hydra.launcher._target_


def require_outcome(command: Command, words: list[str], out: str, err: str) -> None:
    """Require that the command's main result is there, and that the command named it."""
    if "--help" in words:
        assert "  # " in out
        return
    if command.module == "harvest":
        require_harvest(words, out)
        return
    named = paths(out + err)
    assert named, (command.written, err)
    if command.module == "train.publish":
        (folder,) = {path.parent for path in named if path.suffix == ".md"}
        assert (folder / "README.md").is_file() and (folder / "sae.safetensors").is_file()
    if command.module == "analyze":
        require_study(setting(words, "study", "quality"), named)
    if command.module == "train" and not command.world:
        arms = 1
        for word in words:
            arms *= len(word.split(",")) if "-m" in words else 1
        trained = {path for path in named if path.name == "sae_final.pt"}
        assert len(trained) == arms, (command.written, err)


def setting(words: list[str], name: str, default: str) -> str:
    """The value of a setting among the words."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return values[-1] if values else default


def paths(text: str) -> list[Path]:
    """The files and folders that a text names and that are there."""
    named = [Path(word.strip(":;,.")) for word in text.split() if "/" in word]
    return [path for path in named if path.exists()]


def require_study(name: str, named: list[Path]) -> None:
    """The study's files are there; those that are pages are named themselves."""
    if name == "verify":  # it writes nothing
        return
    folders = [path for path in named if path.is_dir()]
    pages = [path for path in named if path.suffix == ".html"]
    assert pages or any((folder / f"{name}.json").is_file() for folder in folders), (name, named)


def require_harvest(words: list[str], out: str) -> None:
    action = setting(words, "action", "run")
    if action == "plan":
        assert re.search(r"\d tokens/s", out)
        return
    stores = [setting(words, "store", "")]
    if not stores[0]:
        stores = sorted(map(str, Path("activations").iterdir()), key=os.path.getmtime)
    store = Store.open(stores[-1])
    if action == "status":
        assert f"{store.units:,}" in out
    if action in ("verify", "repair"):
        assert out.strip()
    if action == "run":
        default = "6" if any(word.startswith("model.path=") for word in words) else "[5,8]"
        layers = setting(words, "layer", default).strip("[]").split(",")
        sites = setting(words, "site", RESID_POST).strip("[]").split(",")
        points = [HookPoint(int(layer), site) for layer, site in product(layers, sites)]
        assert all(store.complete(point) for point in points)


def begin(shell: Shell) -> None:
    """Make the store and the run that a page goes on from, under both names that pages use."""
    for module, settings in BEGINNING.items():
        shell.run(
            Command(
                "the page's beginning", 0, module, f"{settings} store=activations/e4b.zarr".split()
            )
        )
    shutil.copytree("activations/e4b.zarr", "activations/tiny.zarr")
    shutil.copytree("runs/e4b_L21", "runs/demo")


# The module that a launcher's plugin has loaded is not the one that is run, which is all the same.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(
    page: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    unwatched: None,
) -> None:
    shell, text = Shell(monkeypatch, capsys), page.read_text()
    if "s3://" in text and any("s3://" in command.written for command in commands(text)):
        request.getfixturevalue("s3")(monkeypatch)
    if page.name in OF_A_BASE_MODEL:
        (here / "models/mine/chat_template.jinja").unlink()
        monkeypatch.setattr(hub_model, "MODEL_DIR", here / "models/mine")
    if page.name in CONTINUED:
        begin(shell)
    for line in lines(text):
        if command := parsed(line):
            if "reference:sae_final.pt" in line:
                shutil.copy("runs/reference/sae_final.pt", here)
            shell.run(command)
        # Code of the others runs on a store and a run of its own: tests/test_docs.py for store.md,
        # tests/analyze/test_package.py for api.md.
        elif "\n" in line and page.name not in ("store.md", "api.md"):
            run_block(line)
        elif line.startswith("python -c "):
            exec(re.sub(r"\b\d{3,}\b", "2", shlex.split(line)[2]), {})


def run_block(code: str) -> None:
    """Run a page's Python. Training by GRPO takes minutes, so those lines are only compiled."""
    compile(code, "block", "exec")
    code = "".join(
        line for line in code.splitlines(keepends=True) if "trl" not in line and "GRPO" not in line
    )
    # The run's SAE has seen 2,048 rows, so no features of it pass.
    code = code.replace('judged_on="gsm8k/test.jsonl"', "even_if_failed=True")
    names: dict[str, Any] = {}
    exec(code.replace('"google/gemma-4-E4B", device="cuda"', '"embedded", dtype="float32"'), names)
    if "reward" in names:
        assert names["reward"](["Question: 3 + 4?"], [""], [[*range(8, 40)]]) != [0.0]
    if "x_hat" in names:
        assert names["x_hat"].shape == names["x"].shape


def test_commands_are_found() -> None:
    """If commands were overlooked, the test above would pass for nothing."""
    counts = {str(page.relative_to(ROOT)): len(commands(page.read_text())) for page in PAGES}
    least = {
        "README.md": 20,
        "harvest.md": 20,
        "reproduce.md": 12,
        "clusters.md": 9,
        "training.md": 5,
        "studies.md": 2,
    }
    assert all(
        counts[name if name == "README.md" else f"docs/{name}"] >= count
        for name, count in least.items()
    ), counts
    for page in PAGES:
        asked = [
            line
            for line in lines(page.read_text())
            if re.match(r"residual-saes |(python|torchrun|accelerate) [^\n]*-m ", line)
        ]
        assert all(parsed(line) or OTHER.fullmatch(line) for line in asked), (page.name, asked)
