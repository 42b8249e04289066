/* A word to the service manager: "READY=1", "STOPPING=1". Nothing without $NOTIFY_SOCKET. */
#ifndef KVT_DAEMON_NOTIFY_H
#define KVT_DAEMON_NOTIFY_H

void kvt_notify(const char *state);

#endif
