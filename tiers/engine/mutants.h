/* Rules that a test build leaves out, to show that the simulator notices (enum kvt_broken_rule of
 * engine.h). In every other build the test is a constant 0 and costs nothing.
 */
#ifndef KVT_ENGINE_MUTANTS_H
#define KVT_ENGINE_MUTANTS_H

#ifdef KVT_MUTANTS
#define KVT_BROKEN(rules, rule) ((((rules) >> (rule)) & 1) != 0)
#else
#define KVT_BROKEN(rules, rule) ((void)(rules), 0)
#endif

#endif
