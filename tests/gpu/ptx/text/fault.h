// What a kernel did that a GPU would not, or PTX that the machine does not know.
#pragma once

#include <stdexcept>

namespace ptx {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace ptx
