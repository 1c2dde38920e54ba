.PHONY: soak
soak: $(VENV)/.installed  ## A million short processes: memory, descriptors and cost must stay flat; ARGS="--count 100000"
	@exec $(BIN)/python -m soak $(ARGS)
