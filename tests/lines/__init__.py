"""Devices on bad lines: network namespaces whose interfaces `tc` shapes. `make test-lines`; Linux, as root."""
