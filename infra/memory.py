"""The memory that a process may use."""

import ctypes
import os

import torch


def device_memory(device, world):
    """Bytes of a GPU; on a CPU, a process's share of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory() / world


def host_memory():
    """Bytes of this machine's memory."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Windows' MEMORYSTATUSEX: two 32-bit fields (its size, the load), then seven of 64 bits
    status = (ctypes.c_ulonglong * 8)(64)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status[1]
