//! The wait policies and their budgets: plain data.

use serde::{Deserialize, Serialize};

/// The wait policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Spin up to `spin_us`, then sleep.
    Spin,
    /// Sleep at once.
    Park,
    /// Spin up to `auto_us` while that pays, sleep at once while it does not.
    #[default]
    Auto,
}

impl std::str::FromStr for Policy {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "spin" => Ok(Policy::Spin),
            "park" => Ok(Policy::Park),
            "auto" => Ok(Policy::Auto),
            _ => Err(format!("`{s}` is not a wait policy: spin, park or auto")),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Policy::Spin => "spin",
            Policy::Park => "park",
            Policy::Auto => "auto",
        })
    }
}

/// What `auto` is to save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// Time: it spins also while other threads wait for a CPU.
    Latency,
    /// Both: it spins where that pays, and not at all while CPUs are scarce.
    #[default]
    Balanced,
    /// CPU time: it never spins; peers on one core still hand it over to each other.
    Cpu,
}

impl std::str::FromStr for Goal {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "latency" => Ok(Goal::Latency),
            "balanced" => Ok(Goal::Balanced),
            "cpu" => Ok(Goal::Cpu),
            _ => Err(format!("`{s}` is not a goal: latency, balanced or cpu")),
        }
    }
}

/// A policy and its budgets, microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WaitConfig {
    /// The policy.
    pub policy: Policy,
    /// How long `spin` spins before it sleeps.
    pub spin_us: u32,
    /// How long `auto` spins at the most before it sleeps.
    pub auto_us: u32,
    /// What `auto` is to save.
    pub goal: Goal,
}

impl Default for WaitConfig {
    fn default() -> Self {
        WaitConfig { policy: Policy::Auto, spin_us: 10_000, auto_us: 500, goal: Goal::default() }
    }
}
