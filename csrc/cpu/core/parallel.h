// Divides GEMMs into tasks and runs them in parallel.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../common/integers.h"
#include "kernel_table.h"
#include "threads.h"

namespace peft_kernels::cpu {

// Elements per thread below which an elementwise kernel wakes no further thread.
inline constexpr int64_t kElementwiseGrain = kSanitized ? 2048 : 32768;

inline int64_t useful_threads(int64_t multiply_adds) {
  if constexpr (kSanitized) return get_num_threads();
  return std::clamp<int64_t>(multiply_adds / kernels().multiply_adds_per_thread, 1, get_num_threads());
}

// A grid over an m by n output, in units that kernels do not split.
struct Grid {
  int64_t m_parts, n_parts;
  int64_t m_chunk, n_chunk;
};

// Each part of m decodes the panels of its columns again, which costs about as much as this many rows.
inline constexpr int64_t kDecodeRows = 12;

// The cheapest grid of at most `parts` parts.
inline Grid plan_grid(int64_t m, int64_t n, int64_t m_unit, int64_t n_unit, int64_t parts) {
  const int64_t m_units = ceil_div(m, m_unit), n_units = ceil_div(n, n_unit);
  Grid best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t n_parts = 1; n_parts <= std::min(parts, n_units); ++n_parts) {
    const int64_t m_parts = std::min(parts / n_parts, m_units);
    const int64_t m_chunk = ceil_div(m_units, m_parts) * m_unit,
                  n_chunk = ceil_div(n_units, n_parts) * n_unit;
    const int64_t cost = (m_chunk + kDecodeRows) * n_chunk;
    if (cost <= best_cost) {
      best_cost = cost;
      best = {ceil_div(m, m_chunk), ceil_div(n, n_chunk), m_chunk, n_chunk};
    }
  }
  return best;
}

// The arguments of a GEMM with a single term, which must outlive them, and a contiguous output.
inline GemmParams one_term_params(const GemmTerm& term, int64_t m, int64_t n, void* out, DType out_dtype) {
  GemmParams params{};
  params.terms = &term;
  params.term_count = 1;
  params.out = out;
  params.out_dtype = out_dtype;
  params.out_ld = n;
  params.m = m;
  params.n = n;
  return params;
}

using GemmKernel = void (*)(const GemmParams&, const Rect&, void* scratch);

inline void* checked_thread_scratch() {
  void* scratch = thread_scratch();
  TORCH_CHECK(scratch, "out of memory: ", kScratchBytes, " bytes of scratch for a CPU kernel");
  return scratch;
}

// Rows [m_begin, m_end) of a GEMM's output, divided into tasks at multiples of m_unit from m_begin, and of
// n_unit.
struct GemmJob {
  GemmKernel kernel;
  GemmParams params;
  int64_t m_begin, m_end, m_unit, n_unit;

  bool is_empty() const { return m_begin >= m_end || params.n == 0; }
  int64_t multiply_adds() const {
    int64_t depth = 1;
    for (int64_t t = 0; t < params.term_count; ++t) depth += params.terms[t].depth;
    return (m_end - m_begin + kDecodeRows) * params.n * depth;
  }
  void run(const Grid& grid, int64_t task, void* scratch) const {
    const int64_t m0 = m_begin + task % grid.m_parts * grid.m_chunk, n0 = task / grid.m_parts * grid.n_chunk;
    kernel(params, {m0, std::min(m0 + grid.m_chunk, m_end), n0, std::min(n0 + grid.n_chunk, params.n)},
           scratch);
  }
};

// Runs independent GEMMs as one list of tasks for all threads.
inline void run_gemms(const GemmJob* jobs, size_t count) {
  int64_t multiply_adds = 0;
  for (size_t i = 0; i < count; ++i) multiply_adds += jobs[i].is_empty() ? 0 : jobs[i].multiply_adds();
  if (multiply_adds == 0) return;
  const int64_t threads = useful_threads(multiply_adds);
  const int64_t task_size = std::max<int64_t>(multiply_adds / (threads * kTasksPerThread), 1);
  struct Part {
    const GemmJob* job;
    Grid grid;
    int64_t end;  // of its tasks
  };
  std::vector<Part> parts;
  parts.reserve(count);
  int64_t tasks = 0;
  for (size_t i = 0; i < count; ++i) {
    const GemmJob& job = jobs[i];
    if (job.is_empty()) continue;
    const int64_t most = count == 1     ? tasks_for(threads)
                         : threads == 1 ? 1
                                        : ceil_div(job.multiply_adds(), task_size);
    const Grid grid = plan_grid(job.m_end - job.m_begin, job.params.n, job.m_unit, job.n_unit, most);
    parts.push_back({&job, grid, tasks += grid.m_parts * grid.n_parts});
  }
  run_tasks(tasks, threads, [&](Share& share) {
    void* scratch = checked_thread_scratch();
    size_t at = 0;
    for (int64_t task; share.take(task);) {
      while (task >= parts[at].end) ++at;
      parts[at].job->run(parts[at].grid, task - (at ? parts[at - 1].end : 0), scratch);
    }
  });
}

}  // namespace peft_kernels::cpu
