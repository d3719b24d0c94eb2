/* Compiled in every language and standard that a public header promises, as pedantically as the compiler can. */
#include CUFLASH_SPEC_HEADER
#include CUFLASH_SPEC_HEADER /* and twice */
