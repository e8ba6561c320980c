// Refusals of an operator's arguments, as the RuntimeErrors that torch makes of exceptions.
#pragma once

#include <sstream>
#include <stdexcept>

namespace cl_optim {

// What an operator's refusals begin with: check(condition, parts of the message...).
struct Check {
  const char* operation;

  template <typename... Parts>
  void operator()(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::ostringstream message;
    message << operation << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
};

}  // namespace cl_optim
