// Launches ListExpertRows and ClearRest.
#include "row_tiles.cuh"

namespace peft_kernels::cuda {

void list_expert_rows(const ExpertRows& rows, const int* ends, const ResultRows (&results)[2],
                      const Context& context) {
  launch<ListExpertRows>({rows, ends, {results[0], results[1]}}, context.card.sms, context.stream);
}

void clear_rest(const ExpertRows& rows, const ResultRows& result, const Context& context) {
  launch<ClearRest>({rows, result}, context.card.sms, context.stream);
}

}  // namespace peft_kernels::cuda
