// Once more for this module: two compiled modules share no code.
#include "kvstore/native/share.cpp"
