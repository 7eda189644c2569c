# Everything runs in .venv, which is made on first use; the only need is Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# One thread per test process, two processes: small tensors on two cores. Each takes half of the
# tests, file by file, and then from the other's: a file's fixtures are made once.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# Of the demo's studies: its 200 word problems, answered 100 at a time.
ANSWERS := answers.questions=200 answers.new_tokens=64 answers.batch=100

.PHONY: demo test test-long lint clean

demo: .venv/installed  ## the whole pipeline on the embedded model, to a report
	$(BIN)/python -m harvest model=tiny text=tiny tokens=4e5 context=256 store=activations/tiny.zarr
	$(BIN)/python -m train sae=tiny optim=tiny batch=512 store=activations/tiny.zarr run=runs/demo
	$(BIN)/python -m analyze study=quality run=runs/demo
	$(BIN)/python -m analyze study=contrast run=runs/demo $(ANSWERS)
	$(BIN)/python -m analyze study=steering run=runs/demo $(ANSWERS) study.scales=[5,-5] study.n_random=8 study.n_shuffled=3
	$(BIN)/python -m analyze study=logit_lens run=runs/demo study.target=digit
	$(BIN)/python -m analyze study=catalogue run=runs/demo
	$(BIN)/python -m analyze study=browser run=runs/demo
	$(BIN)/python -m analyze study=report run=runs/demo

test: .venv/installed  ## the whole test suite, under 7 minutes on two cores
	$(TEST)

test-long: .venv/installed  ## the loops of minutes: hundreds of kills
	$(TEST) -m long

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv, which takes a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv activations runs
