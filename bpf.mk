# The BPF programs: needs clang, bpftool and libbpf's headers (Debian: clang bpftool libbpf-dev).
# The blob is committed and shipped, so that neither users nor the wheel's build need any of them.

PACKAGES += clang bpftool libbpf-dev
BPF_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
BPF_BLOB := procwatch/sources/ebpf/procwatch.bpf.bin
export PATH := $(PATH):/usr/sbin

.PHONY: bpf bpf-check
bpf: ## Build the BPF blob from its C source
	$(BPF_PYTHON) -m procwatch.sources.ebpf.build $(BPF_BLOB)

# Byte for byte with the tools of Debian 12 (clang 14.0.6, bpftool 7.1.0); another clang compiles other instructions.
bpf-check: packages ## Fail when the committed blob is not what the source gives
	@blob=$$(mktemp) && trap 'rm -f "$$blob"' EXIT && $(BPF_PYTHON) -m procwatch.sources.ebpf.build "$$blob" && \
		if cmp "$$blob" $(BPF_BLOB); then echo "$(BPF_BLOB) is what the source gives"; \
		else clang --version | head -1; bpftool version | head -1; exit 1; fi
