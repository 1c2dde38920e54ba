# Tests in other kernels, emulated: needs qemu-system-x86 and e2fsprogs, and apt's sources for the kernels themselves.
# ARGS are pytest's: `make test-kernels ARGS="tests/kernel/test_ebpf_source.py -k script"`

KERNELS_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
# Without ARGS the tests of the sources and backends (tests/kernels/boot.py says which not, and why). At the end stands a
# line for each kernel, "N passed, N failed, N skipped". What cannot be installed or downloaded is said there, too, and is
# no failure. Each kernel is one of 6.1, 6.12 or the name of a Debian package of a cloud kernel.
KERNELS ?= 6.1 6.12

.PHONY: test-kernels
test-kernels: ## Run the sources' tests in Debian's 6.1 and 6.12; ARGS="..." passes options to pytest
	@$(MAKE) --no-print-directory packages PACKAGES="$(PACKAGES) qemu-system-x86 e2fsprogs" || :
	@$(KERNELS_PYTHON) -m tests.kernels.boot $(KERNELS:%=--kernel %) $(ARGS)
