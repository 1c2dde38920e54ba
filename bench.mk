# What watching costs on this host; other tools are measured too where they are installed (see docs/completeness.md).
.PHONY: bench
bench: $(VENV)/.installed  ## Cost and completeness of each backend on this host; ARGS="--count 20000" passes options
	@exec $(BIN)/procwatch bench $(ARGS)
