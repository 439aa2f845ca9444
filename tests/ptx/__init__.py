"""A machine for PTX: runs on the CPU what Triton compiles for a card, and watches every access to memory.

Triton's interpreter runs a kernel's source as one thread in float32. This runs the code that the compiler made of it:
threads of all warps, shared memory, barriers, asynchronous copies, and products of bfloat16, e4m3 and int8 on tensor
cores. Like NVIDIA's compute-sanitizer it refuses accesses outside of tensors, misaligned ones, reads of shared memory
that nothing was written to, and two warps that meet at a byte without a barrier between them.

Semantics: NVIDIA's "Parallel Thread Execution ISA" 8.7. `parse.py`: text to instructions; `scalar.py`: what a thread
does by itself; `collective.py`: what a warp does together; `memory.py`; `machine.py`: who runs when.
"""
