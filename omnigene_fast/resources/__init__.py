"""The resource report of `omnigene-fast kernels`: what every GPU kernel takes, without a GPU.

| file            | what                                                                       |
|-----------------|----------------------------------------------------------------------------|
| launches.py     | what is compiled: every launch of the Triton launchers that differs        |
| experts.py      | of which the experts'                                                      |
| cuda_kernels.py | and the CUDA C++ kernels                                                   |
| recorder.py     | a launch on meta tensors becomes a job: signature, constants, alignment    |
| build.py        | a job becomes a cubin and its resources; processes, cache                  |
| built.py        | what is read from a cubin                                                  |
| sass.py         | machine code by the CUDA tools of Triton's wheel                           |
| occupancy.py    | blocks per multiprocessor                                                  |
| predict.py      | bytes, FLOPs, waves, floor                                                 |
| report.py       | rows, and the sentences about what must not be                             |
| table.py        | rows as text, JSON, markdown                                               |

Importing this package imports nothing; its modules need triton, and not in interpreter mode.
"""
