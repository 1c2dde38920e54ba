# Coverage-guided fuzzing of all that takes bytes of strangers. atheris has wheels for few machines, so `check` does
# without it: there the targets only run on their seeds (tests/test_fuzz.py).
FUZZ_RUNS ?= 1000000
FUZZ_TARGETS ?= $(shell $(BIN)/python -c 'from fuzz.targets import TARGETS; print(*TARGETS)' 2>/dev/null)

.PHONY: fuzz
fuzz: $(VENV)/.tested  ## Fuzz every decoder, FUZZ_RUNS=1000000 inputs each; FUZZ_TARGETS="ring elf" chooses
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) atheris
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p .fuzz/$$target && $(BIN)/python -m fuzz $$target -runs=$(FUZZ_RUNS) -max_len=4096 -verbosity=0 \
			-artifact_prefix=.fuzz/$$target- .fuzz/$$target >.fuzz/$$target.log 2>&1 || \
			{ tail -40 .fuzz/$$target.log; echo "$$target: failed" >&2; exit 1; }; \
		echo "$$target: $(FUZZ_RUNS) inputs"; \
	done
