# Everything runs in .venv, which is made on first use; the only need is Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# One thread per test process, three processes: small tensors on two cores, and many tests wait for
# a disk or another process. Each takes a third of the tests, file by file, and then from the
# others': a file's fixtures are made once. What they compile is kept, or each process would compile
# the tests and the product anew: 20 s.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal -q

# Of the demo's studies: its 200 word problems, answered 100 at a time.
ANSWERS := answers.questions=200 answers.new_tokens=64 answers.batch=100

.PHONY: demo test test-docs test-package test-long test-faults test-libraries gpu-check lint clean

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

test: .venv/installed  ## the whole test suite, 13 minutes on two cores
	$(TEST)

test-docs: .venv/installed  ## every command of README and docs, in small, and the notebooks of examples/
	$(TEST) -m docs

test-package: .venv/installed  ## wheel and sdist: built, compared, installed alone, and run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "long or not long" tests/test_package.py

test-long: .venv/installed  ## the loops of minutes: hundreds of kills
	$(TEST) -m long

test-faults: .venv/installed  ## power losses, kills, damage and failing calls, with a table of what came
	$(TEST) tests/faults -m "long or not long"

# SAELens, sparsify and dictionary_learning beside the packages of .venv, whose versions they keep.
# dictionary_learning is for an older nnsight, which nothing here needs.
LIBRARIES := sae-lens==6.54.12 eai-sparsify==1.3.3 zstandard==0.25.0
test-libraries: .interop/installed  ## they write every kind that they know, and read ours
	INTEROP_PYTHON=$(CURDIR)/.interop/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q tests/train/test_libraries.py tests/train/test_publish.py

gpu-check: .venv/installed  ## on one GPU: kernels, training, harvest, the same bits, a killed run; eight minutes at most
	$(BIN)/python -m tests.bench.gpu_check

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv, which takes a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.interop/installed: .venv/installed constraints.txt Makefile
	$(BIN)/python -m venv .interop
	$(BIN)/python -c "import site; print(*site.getsitepackages())" \
		> "$$(.interop/bin/python -c 'import site; print(*site.getsitepackages())')/dev.pth"
	.interop/bin/python -m pip install --quiet -c constraints.txt $(LIBRARIES)
	.interop/bin/python -m pip install --quiet --no-deps dictionary-learning==0.1.0 circuit-tracer==0.5.0
	touch $@

clean:
	rm -rf .venv .interop activations runs
