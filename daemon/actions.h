/* What the engine asks for, carried out: one function for one action. Loop thread. Never calls the
 * engine (an action that is carried out may not change what the next one is).
 */
#ifndef KVT_DAEMON_ACTIONS_H
#define KVT_DAEMON_ACTIONS_H

#include "tiers/engine/engine.h"

struct kvt_daemon;

void kvt_action_carry_out(struct kvt_daemon *d, const struct kvt_action *a);

#endif
