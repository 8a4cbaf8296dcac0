# shellcheck shell=sh
# The frame of Understudy's hotplug scripts: results, first cause, roll-back, one at a time. Sourced, never run.
# hotplug/README.md is the contract that it keeps; POSIX sh, with flock(1) of util-linux as the one thing more.
#
#   attempt COMMAND...   run it. Its words, or what failed and with which words, are in $output; its status is returned
#   run COMMAND...       attempt, or fail
#   pick ARGUMENT...     attempt awk with these over $output, which is then what awk printed
#   undo STEP...         on failure, do this before everything given to undo earlier. STEP is a function or an attempt,
#                        words without blanks, that leaves $output as attempt does. Say it before what it takes back:
#                        a command may do its work and fail all the same
#   fail SENTENCE        end: take back, tell, exit 2, or 3 if taking back failed too
#   finish STATUS        end with that answer; nothing is taken back
#   result KEY VALUE     hand one result over: xenstore if XENBUS_PATH is set, else KEY=VALUE on standard output
#   forget KEY...        remove results from xenstore; what standard output has said stays said
#   say SENTENCE         tell the log, on standard error
#   one_at_a_time NAME   hold the machine-wide lock NAME until the end, or fail
#
# A signal that can be caught ends the script as a failure does. After SIGKILL a teardown cleans up.

set -uf        # no globbing: names of interfaces are words, never patterns
LC_ALL=C       # the words of tools are read
export LC_ALL
exec </dev/null

output=
frame_undone=
frame_ended=
frame_newline='
'

attempt() {
    output=$("$@" 2>&1) && return
    set -- "$?" "$*"
    # shellcheck disable=SC2089  # quotes for readers, never for the shell
    output="'$2' failed: ${output:-exit status $1}"
    return "$1"
}

run() {
    attempt "$@" || fail "$output"
}

pick() {
    attempt awk "$@" <<END
$output
END
}

undo() {
    frame_undone="$*$frame_newline$frame_undone"
}

fail() {
    # What follows is short and must come to its end.
    trap '' HUP INT TERM
    frame_ended=yes
    frame_reason=$1
    frame_status=2
    while [ -n "$frame_undone" ]; do
        frame_step=${frame_undone%%"$frame_newline"*}
        frame_undone=${frame_undone#*"$frame_newline"}
        # shellcheck disable=SC2086  # undo takes words without blanks
        if ! $frame_step; then
            frame_status=3
            frame_reason="$frame_reason; taking back failed too, teardown is needed: $output"
        fi
    done
    # One line, blanks folded: a value ends at the end of its line.
    # shellcheck disable=SC2086,SC2090
    set -- $frame_reason
    frame_reason=$*
    say "$frame_reason"
    # The exit status tells in any case: a result that cannot be handed over now changes nothing.
    hand_over hotplug-error "$frame_reason" || say "$output"
    hand_over hotplug-status error || say "$output"
    exit "$frame_status"
}

finish() {
    frame_ended=yes
    exit "$1"
}

result() {
    hand_over "$1" "$2" || fail "$output"
}

hand_over() {
    if [ -n "${XENBUS_PATH:-}" ]; then
        attempt xenstore-write "$XENBUS_PATH/$1" "$2"
    else
        printf '%s=%s\n' "$1" "$2"
    fi
}

forget() {
    [ -n "${XENBUS_PATH:-}" ] || return 0
    for frame_key; do
        attempt xenstore-rm "$XENBUS_PATH/$frame_key" && continue
        # It fails for what is not there, too.
        frame_reason=$output
        if attempt xenstore-exists "$XENBUS_PATH/$frame_key"; then fail "$frame_reason"; fi
    done
}

say() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
}

one_at_a_time() {
    frame_directory=${UNDERSTUDY_HOTPLUG_DIR:-/run/understudy/hotplug}
    run mkdir -p "$frame_directory"
    [ -w "$frame_directory" ] || fail "$frame_directory, where the lock belongs, cannot be written"
    exec 9>"$frame_directory/$1.lock"
    attempt flock -w 10 9 || fail "another process has held $frame_directory/$1.lock for 10 s"
}

trap 'fail "ended by a signal"' HUP INT TERM
trap '[ -n "$frame_ended" ] || fail "ended by its shell (the message is on standard error)"' EXIT
