#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string>

#include "fault.h"
#include "statement.h"

namespace ptx {

void fail_to_read(std::string_view near, const std::string& what) {
  const std::string_view line = near.substr(0, near.find('\n'));
  throw Fault("PTX: " + what + " at \"" + std::string(line.substr(0, 120)) + "\"");
}

bool Scanner::done() {
  while (at_ < text_.size()) {
    if (std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
      ++at_;
    } else if (text_.compare(at_, 2, "//") == 0) {
      at_ = std::min(text_.find('\n', at_), text_.size());
    } else if (text_.compare(at_, 2, "/*") == 0) {
      const size_t end = text_.find("*/", at_);
      at_ = end == std::string_view::npos ? text_.size() : end + 2;
    } else {
      return false;
    }
  }
  return true;
}

bool Scanner::take(char c) {
  if (!is(c)) return false;
  ++at_;
  return true;
}

void Scanner::expect(char c) {
  if (!take(c)) fail_to_read(rest(), std::string("expected ") + c);
}

std::string_view Scanner::word() {
  done();
  const size_t begin = at_;
  const auto belongs = [&](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%' || c == '.';
  };
  while (at_ < text_.size()) {
    if (belongs(text_[at_])) {
      ++at_;
    } else if (text_.compare(at_, 2, "::") == 0) {
      at_ += 2;
    } else {
      break;
    }
  }
  return from(begin);
}

std::string_view Scanner::until(char c) {
  const size_t end = text_.find(c, at_);
  if (end == std::string_view::npos) fail_to_read(rest(), std::string("expected ") + c);
  const std::string_view found = text_.substr(at_, end - at_);
  at_ = end + 1;
  return found;
}

std::string_view Scanner::line() {
  const size_t end = std::min(text_.find('\n', at_), text_.size());
  const std::string_view found = text_.substr(at_, end - at_);
  at_ = end;
  return found;
}

std::string_view Scanner::braces() {
  expect('{');
  const size_t begin = at_;
  for (int depth = 1; at_ < text_.size(); ++at_) {
    const char c = text_[at_];
    if (c == '/' && text_.compare(at_, 2, "//") == 0) {
      line();
      if (at_ == text_.size()) break;
    } else if (c == '"') {
      at_ = text_.find('"', at_ + 1);
      if (at_ == std::string_view::npos) break;
    } else if (c == '{') {
      ++depth;
    } else if (c == '}' && --depth == 0) {
      const std::string_view found = from(begin);
      ++at_;
      return found;
    }
  }
  fail_to_read(text_.substr(begin), "expected }");
}

int64_t Scanner::number() {
  const bool negative = take('-');
  int64_t value = 0;
  const std::string_view text = word();
  if (!read_immediate(text, value)) fail_to_read(text, "expected a number");
  return negative ? -value : value;
}

bool read_immediate(std::string_view word, int64_t& value) {
  const bool negative = !word.empty() && word[0] == '-';
  std::string digits(word.substr(negative ? 1 : 0));
  if (digits.empty() || std::isdigit(static_cast<unsigned char>(digits[0])) == 0) return false;
  char* end = nullptr;
  const bool is_float = digits.size() > 2 && digits[0] == '0' && std::string_view("fFdD").find(digits[1]) < 4;
  if (is_float) {
    digits = digits.substr(2);
    value = static_cast<int64_t>(std::strtoull(digits.c_str(), &end, 16));
  } else {
    if (!digits.empty() && digits.back() == 'U') digits.pop_back();
    const uint64_t magnitude = std::strtoull(digits.c_str(), &end, 0);
    value = static_cast<int64_t>(negative ? ~magnitude + 1 : magnitude);
  }
  return end == digits.c_str() + digits.size();
}

int bytes_of_type(std::string_view type) {
  if (type == "pred") return 0;
  if (type == "f16x2" || type == "bf16x2" || type == "tf32") return 4;
  if (type == "bf16") return 2;
  if (type.size() < 2 || std::string_view("busf").find(type[0]) == std::string_view::npos) return -1;
  int bits = 0;
  for (const char c : type.substr(1)) {
    if (std::isdigit(static_cast<unsigned char>(c)) == 0) return -1;
    bits = 10 * bits + (c - '0');
  }
  return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128 ? bits / 8 : -1;
}

}  // namespace ptx
