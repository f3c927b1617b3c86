# Sourced: an apt state of our own, so that packages of other suites can be fetched and the system itself is not touched.
# private_apt TYPE SUITE DIR (deb or deb-src; DIR keeps the state): sets the array apt_options, and updates the lists.
private_apt() {
  local type=$1 suite=$2 state=$3 mirror keys
  mkdir -p "$state"/state/lists/partial "$state"/cache/archives/partial
  mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{sources,list} 2>/dev/null |
    awk '/^URIs:|^deb /&&!/security/{print $2; exit}' || true)
  [ -n "$mirror" ] || { echo "$0: no Debian mirror in /etc/apt" >&2; return 1; }
  keys=$(ls /usr/share/keyrings/debian-archive-keyring.* | head -1)
  echo "$type [signed-by=$keys] $mirror $suite main" >"$state/sources.list"
  apt_options=(-o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$state/state/lists" -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root)
  apt-get "${apt_options[@]}" -qq update
}
