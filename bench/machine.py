"""Which processor this is, as the results of benchmarks name it."""
import platform
from pathlib import Path

def processor():
    info = Path("/proc/cpuinfo")
    return next((line.split(":")[1].strip() for line in (info.read_text().splitlines() if info.exists() else []) if line.startswith("model name")), platform.processor())
