/* Long calls that can be stopped: by cuflash_interrupt(), or by Ctrl-C where the caller asked for that. */
#ifndef CUFLASH_INTERRUPT_H
#define CUFLASH_INTERRUPT_H

#include "status.h"

/* A long call is between begin and end. begin returns the ticket that cuflash_interrupted asks about. */
unsigned cuflash_interruptible_begin(void);
void cuflash_interruptible_end(void);

/* Has this call been told to stop? Cheap enough to ask for every tile of work. */
bool cuflash_interrupted(unsigned ticket);

#endif
