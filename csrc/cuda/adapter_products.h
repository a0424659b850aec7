// The products of LoRA adapters, in fp32: adapters and h are never rounded to the activations' type. The
// general way, by torch's products, for any shape and type.
#pragma once

#include <vector>

#include "../common/lora_args.h"
#include "runtime.h"

namespace peft_kernels::cuda {

struct Adapter : AdapterArgs {
  DropoutMask mask;
  Tensor seed;    // what mask.seed points into
  Tensor others;  // bool [m, 1]: the rows that it does not serve; undefined when it serves all

  Adapter(AdapterArgs args, const OptionalTensor& seed, const OptionalTensor& row_group);
};

using Adapters = std::vector<Adapter>;

Adapters with_rows(std::vector<AdapterArgs> args, const OptionalTensor& seed,
                   const OptionalTensor& row_group);

// h[m, ranks] = x A^T of every adapter in its rows, 0 elsewhere.
Tensor down_products(const Tensor& x, const Adapters& adapters);

// Adds scaling h B^T of the layer's adapters to y, in their rows.
void add_deltas(const Tensor& h, const Adapters& adapters, size_t layer, Tensor& y);

// dh[m, ranks] = scaling dY B of every adapter in its rows, 0 elsewhere; `dy` by layer.
Tensor up_gradients(const std::vector<Tensor>& dy, const Adapters& adapters, const Tensor& h);

// Adds dh A of every adapter to dx, in its rows and as its mask has it.
void add_input_gradients(const Tensor& dh, const Adapters& adapters, Tensor& dx);

// Sums over the rows that the adapter serves.
Tensor gradient_of_a(const Tensor& dh, const Tensor& x, const Adapter& adapter);
Tensor gradient_of_b(const Tensor& dy, const Tensor& h, const Adapter& adapter);

}  // namespace peft_kernels::cuda
