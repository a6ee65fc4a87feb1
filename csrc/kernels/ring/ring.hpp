// The four kernels of a ring: a send is two of them around a copy, a receive the other two.
#pragma once

#include "kernels/ring/before_receive.hpp"
#include "kernels/ring/before_send.hpp"
#include "kernels/ring/behind_receive.hpp"
#include "kernels/ring/behind_send.hpp"
