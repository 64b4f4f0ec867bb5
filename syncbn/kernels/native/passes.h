#include "element.h"
#include "moments.h"
#include "output.h"
#include "gradients.h"
