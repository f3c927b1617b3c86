//! What can be tuned, and the settings that a point of it stands for.

use super::mix::Mix;
use super::search::{Parameter, Point};
use tunnelfs_ring::{allowed_cpus, Policy};
use tunnelfs_settings::Settings;

/// The parameters of a workload on this machine.
pub struct Space {
    /// In the order of points.
    pub parameters: Vec<Parameter>,
    base: Settings,
    cpus: Vec<usize>,
}

/// Memory of all slots of all queues: more is not tried.
const MOST_MEMORY: u64 = 512 << 20;

/// Where the queues' threads of guest and host run.
const PLACES: [&str; 3] = ["auto", "beside", "same"];

impl Space {
    /// All that makes a difference to `mix`, round the settings in `base`.
    pub fn new(base: &Settings, mix: &Mix) -> Space {
        let cpus = allowed_cpus();
        let (transport, wait) = (&base.transport, &base.wait);
        let least = mix.largest().max(8192).next_power_of_two();
        let sizes = [8u32, 16, 64, 128, 256, 512, 1024, 2048].map(|kib| kib << 10);
        let sizes: Vec<u32> = sizes.into_iter().filter(|s| *s >= least).collect();
        let mut parameters = vec![
            numbers("transport.entries", &[8, 16, 32, 64, 128, 256, 512], transport.entries),
            numbers("transport.slots", &[2, 4, 8, 16, 32, 64, 128], transport.slots),
            numbers("transport.slot_size", &sizes, transport.slot_size.max(least)),
            words("wait.policy", &["park", "auto", "spin"], &wait.policy.to_string()),
            numbers("wait.auto_us", &[20, 50, 100, 200, 500, 1000, 2000], wait.auto_us),
            numbers("wait.spin_us", &[50, 200, 1000, 10_000, 100_000], wait.spin_us),
        ];
        if cpus.len() > 1 {
            parameters.push(words("placement", &PLACES, "auto"));
        }
        if mix.threads() > 1 && cpus.len() > 1 {
            let all = cpus.len() as u32;
            let counts: Vec<u32> = (0..6).map(|n| 1 << n).filter(|n| *n < all).chain([all]).collect();
            let default = if transport.queues == 0 { all } else { transport.queues.into() };
            parameters.push(numbers("transport.queues", &counts, default));
        }
        Space { parameters, base: base.clone(), cpus }
    }

    fn value(&self, point: &Point, name: &str) -> Option<&str> {
        let i = self.parameters.iter().position(|p| p.name == name)?;
        self.parameters[i].values.get(point[i]).map(String::as_str)
    }

    fn number(&self, point: &Point, name: &str, otherwise: u32) -> u32 {
        self.value(point, name).and_then(|v| v.parse().ok()).unwrap_or(otherwise)
    }

    /// The settings of a point; all queues are there, whatever a workload uses of them.
    pub fn settings(&self, point: &Point) -> Settings {
        let mut settings = self.base.clone();
        let transport = &mut settings.transport;
        transport.entries = self.number(point, "transport.entries", transport.entries);
        transport.slots = self.number(point, "transport.slots", transport.slots);
        transport.slot_size = self.number(point, "transport.slot_size", transport.slot_size);
        transport.queues = self.number(point, "transport.queues", 1) as u16;
        settings.wait.policy = self.value(point, "wait.policy").and_then(|v| v.parse().ok()).unwrap_or(Policy::Auto);
        settings.wait.auto_us = self.number(point, "wait.auto_us", settings.wait.auto_us);
        settings.wait.spin_us = self.number(point, "wait.spin_us", settings.wait.spin_us);
        if let Some((guest, host)) = self.places(point) {
            (settings.mount.cpus, settings.host.cpus) = (guest, host);
        }
        settings
    }

    /// The CPUs of the queues' threads, of guest and host, unless the host finds its own.
    fn places(&self, point: &Point) -> Option<(Vec<usize>, Vec<usize>)> {
        let place = self.value(point, "placement").filter(|p| *p != "auto")?;
        let next = |i: usize| self.cpus[(i + 1) % self.cpus.len()];
        let host = match place {
            "beside" => (0..self.cpus.len()).map(next).collect(),
            _ => self.cpus.clone(),
        };
        Some((self.cpus.clone(), host))
    }

    /// The point that means the same, if it can be.
    pub fn canonical(&self, point: &Point) -> Option<Point> {
        let settings = self.settings(point);
        let transport = &settings.transport;
        let memory = u64::from(transport.slots) * u64::from(transport.slot_size) * u64::from(transport.queues.max(1));
        if transport.slots > transport.entries || memory > MOST_MEMORY {
            return None;
        }
        let mut point = point.clone();
        let unused: &[&str] = match settings.wait.policy {
            Policy::Auto => &["wait.spin_us"],
            Policy::Spin => &["wait.auto_us"],
            Policy::Park => &["wait.spin_us", "wait.auto_us"],
        };
        for (i, parameter) in self.parameters.iter().enumerate() {
            if unused.contains(&parameter.name) {
                point[i] = parameter.default;
            }
        }
        Some(point)
    }

    /// What a point changes, as `key = value`; nothing of the defaults.
    pub fn changes(&self, point: &Point) -> Vec<(&'static str, String)> {
        let changed = self.parameters.iter().zip(point).filter(|(parameter, value)| parameter.default != **value);
        changed.map(|(parameter, value)| (parameter.name, parameter.values[*value].clone())).collect()
    }

    /// The same in one line.
    pub fn words(&self, point: &Point) -> String {
        let changes: Vec<String> =
            self.changes(point).iter().map(|(name, value)| format!("{name} = {value}")).collect();
        if changes.is_empty() {
            "the defaults".into()
        } else {
            changes.join(", ")
        }
    }
}

/// Values with the default among them.
fn numbers(name: &'static str, values: &[u32], default: u32) -> Parameter {
    let mut values = values.to_vec();
    values.push(default);
    values.sort_unstable();
    values.dedup();
    let default = values.iter().position(|v| *v == default).unwrap_or(0);
    Parameter { name, values: values.iter().map(u32::to_string).collect(), default }
}

fn words(name: &'static str, values: &[&str], default: &str) -> Parameter {
    let at = values.iter().position(|v| *v == default).unwrap_or(0);
    Parameter { name, values: values.iter().map(|v| (*v).into()).collect(), default: at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_settings_that_can_be() {
        let mix = Mix::built_in("mixed", 2).expect("built in");
        let space = Space::new(&Settings::default(), &mix);
        let default: Point = space.parameters.iter().map(|p| p.default).collect();
        assert_eq!(space.canonical(&default), Some(default.clone()));
        assert_eq!(space.words(&default), "the defaults");
        let with = |name: &str, value: &str| {
            let i = space.parameters.iter().position(|p| p.name == name).expect("a parameter");
            let mut point = default.clone();
            point[i] = space.parameters[i].values.iter().position(|v| v == value).expect("a value");
            point
        };
        assert_eq!(space.settings(&with("transport.slots", "8")).transport.slots, 8);
        assert_eq!(space.canonical(&with("transport.slots", "128")), None, "more slots than entries");
        assert_eq!(space.canonical(&with("wait.spin_us", "50")), Some(default.clone()), "auto has no spin_us");
        assert_eq!(space.words(&with("wait.policy", "park")), "wait.policy = park");
        // What is written reads back as the same.
        let settings = space.settings(&with("transport.entries", "256"));
        let text = toml::to_string(&settings).expect("TOML");
        assert_eq!(toml::from_str::<Settings>(&text).map_err(|e| e.to_string()), Ok(settings));
    }

    #[test]
    fn slots_hold_the_largest_payload() {
        let space = Space::new(&Settings::default(), &Mix::built_in("large", 2).expect("built in"));
        let sizes = space.parameters.iter().find(|p| p.name == "transport.slot_size").expect("a parameter");
        assert_eq!(sizes.values, ["1048576", "2097152"]);
    }
}
