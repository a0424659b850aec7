// Finds the PTX in a fat binary, which nvcc embeds in host objects. The layout is undocumented; this part has
// not changed since CUDA 9.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string_view>
#include <tuple>

namespace peft_kernels::cudart {

// The argument of __cudaRegisterFatBinary.
struct FatBinaryWrapper {
  uint32_t magic, version;
  const char* data;
  const void* unused;
};

// For which cards a text is: of this architecture (80 for compute_80) and newer ones, or of this one alone
// (compute_90a).
struct Target {
  int architecture;
  bool alone;

  bool operator<(const Target& other) const {
    return std::tie(architecture, alone) < std::tie(other.architecture, other.alone);
  }
};

inline bool is_for_one_architecture(std::string_view text) {
  constexpr std::string_view kTarget = ".target sm_";
  const size_t digits = text.find(kTarget);
  const size_t end = text.find_first_not_of("0123456789", digits + kTarget.size());
  return digits != std::string_view::npos && end != std::string_view::npos && text[end] == 'a';
}

// The texts, without trailing zeros.
inline std::map<Target, std::string_view> ptx_texts(const void* wrapper) {
  struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;  // of all parts
  };
  struct Part {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;
    uint32_t compressed_bytes, options_offset;
    uint16_t minor, major;
    uint32_t architecture;
  };
  constexpr uint32_t kWrapperMagic = 0x466243b1, kMagic = 0xba55ed50;
  constexpr uint16_t kPtx = 1;
  const auto& outer = *static_cast<const FatBinaryWrapper*>(wrapper);
  Header header;
  std::memcpy(&header, outer.data, sizeof(header));
  if (outer.magic != kWrapperMagic || header.magic != kMagic) {
    throw std::runtime_error("fat binary: unsupported layout");
  }
  std::map<Target, std::string_view> texts;
  const char* at = outer.data + header.header_bytes;
  const char* const end = at + header.bytes;
  while (at < end) {
    Part part;
    std::memcpy(&part, at, sizeof(part));
    at += part.header_bytes;
    if (part.kind == kPtx) {
      if (part.compressed_bytes != 0)
        throw std::runtime_error("fat binary: expected uncompressed PTX, compile with --no-compress");
      const std::string_view text(at, part.bytes);
      const std::string_view found = text.substr(0, text.find('\0'));
      texts[{static_cast<int>(part.architecture), is_for_one_architecture(found)}] = found;
    }
    at += part.bytes;
  }
  return texts;
}

}  // namespace peft_kernels::cudart
