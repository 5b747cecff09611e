// All kernels in one module: loaded once, compiled in a fraction of a second.
#include "cast.cu"
#include "image.cu"
#include "pool.cu"
#include "rows.cu"
#include "topk.cu"
