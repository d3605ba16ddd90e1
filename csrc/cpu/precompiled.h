// Compiled once per instruction-set level (setup.py): LibTorch's headers and GCC's intrinsics are
// most of what a small kernel takes to compile. No source includes this file.
#include "tensor.h"
